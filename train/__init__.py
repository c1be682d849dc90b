"""Feature store -> batches -> draft -> checkpoint that the engines serve.

``pipeline`` trains, ``export`` writes the draft and ``check`` refuses a wrong one,
``evaluate`` measures it. The target itself is never loaded to train or export.
"""
