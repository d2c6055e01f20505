"""The embed job: shards in, committed parts out, every image exactly once.

Not called ``embed``: an imported subpackage would take the place of the function of that name.
"""
