"""How a convolution is packed and run: the format of kept weights, the primitive, the border to C++."""
