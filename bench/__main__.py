"""What there is to run.

make bench                            measure every loss on this CPU: half an hour; writes a file to bench/results
make bench BENCH_ARGS=--quick         a subset: about two minutes; writes to build/bench
make readme                           README's figures and picture, and bench/RESULTS.md, from the newest result file

python -m bench.report [FILE]         print the tables of a result file
python -m bench.compare OLD NEW       which speed-ups fell by more than their spread
python -m bench.triton_resources      compile the Triton kernels for every architecture: registers, spills
python -m bench.cuda_resources        the same for the CUDA kernels
python -m bench.gpu FILE              measure on a GPU (docs/gpu-run.md)
"""

print(__doc__)
