#!/usr/bin/env python3
"""py_sdpa.py: cuDNN makes a plan of our graph of attention (build/check-sdpa), for devices that are described to it.

Needs cuDNN and no GPU: a driver of the tests' own, where any kernel can be loaded, stands in NVIDIA's way.
"""
import os
import subprocess
import sys

BUILD = os.environ.get('KIVI_BUILD') or 'build'
PROGRAM = os.path.join(BUILD, 'check-sdpa')
DRIVER = os.path.join(BUILD, 'fake-driver')


def main():
    if not os.access(PROGRAM, os.X_OK) or not os.access(os.path.join(DRIVER, 'libcuda.so.1'), os.R_OK):
        print('skip plans: there is no nvcc, so nothing of CUDA was built')
        return 0
    path = [os.path.abspath(DRIVER), *filter(None, [os.environ.get('LD_LIBRARY_PATH')])]
    env = dict(os.environ, LD_LIBRARY_PATH=':'.join(path))
    return subprocess.run([PROGRAM], env=env, check=False).returncode


if __name__ == '__main__':
    sys.exit(main())
