"""The commands of `fineline`, a function each: it reads its options and calls a room.

Rooms are imported inside the functions, so that --help answers at once.
"""
