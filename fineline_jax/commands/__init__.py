"""The commands of `fineline`, a function each: it reads its options and calls another package.

Other packages are imported inside the functions, so that --help answers at once.
"""
