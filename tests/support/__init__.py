"""What tests of several folders share: the program and its runs, small data sets, small networks."""
