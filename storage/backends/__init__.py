"""Where the files of a store live: a local disk or object storage, written durably."""
