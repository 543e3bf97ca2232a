"""From a file and a folder of pictures to a faster network, in one command."""
