def tables(results): return ""
def plot(results): return ""
