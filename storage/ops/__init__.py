"""Operations on whole stores: merge, prune, select, gc, verify, info, size estimate."""
