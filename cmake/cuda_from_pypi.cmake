# A CUDA compiler without a toolkit: that of the packages cuda-toolkit[nvcc,cudart,cccl], which pip has put beside the
# build tools (pyproject.toml) or which are installed where Python is.
find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(COMMAND "${Python_EXECUTABLE}" -c "import nvidia.cu13; print(*nvidia.cu13.__path__)"
                OUTPUT_VARIABLE cuda_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT EXISTS "${cuda_root}/bin/nvcc")
  message(FATAL_ERROR "LEETCORE_CUDA_FROM_PYPI=ON, but ${Python_EXECUTABLE} has no package cuda-toolkit[nvcc,cudart,cccl]==13.0.*")
endif()
set(CMAKE_CUDA_COMPILER "${cuda_root}/bin/nvcc")
# The packages have lib/ where this nvcc looks for lib64/: said for the tests of the compiler, and for the build.
set(ENV{LIBRARY_PATH} "${cuda_root}/lib:$ENV{LIBRARY_PATH}")
link_directories("${cuda_root}/lib")
