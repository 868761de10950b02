"""What setup.py builds with: the environment, what CUDA needs, the sources, and the compilers. It imports neither torch nor
setuptools, so the programs of csrc that check headers, compile for CUDA and make the wheel use it too."""
