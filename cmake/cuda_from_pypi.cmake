# Takes the CUDA compiler from the Python packages cuda-toolkit[nvcc,cudart,cccl]. pip has installed
# them with the build tools (pyproject.toml), or they are installed for this Python.
find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(COMMAND "${Python_EXECUTABLE}" -c "import nvidia.cu13; print(*nvidia.cu13.__path__)"
                OUTPUT_VARIABLE cuda_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT EXISTS "${cuda_root}/bin/nvcc")
  message(FATAL_ERROR "LEETCORE_CUDA_FROM_PYPI=ON, but ${Python_EXECUTABLE} has no package cuda-toolkit[nvcc,cudart,cccl]==13.0.*")
endif()
set(CMAKE_CUDA_COMPILER "${cuda_root}/bin/nvcc")
# nvcc looks for lib64/, but the packages have lib/. The variable is for CMake's tests of the
# compiler, link_directories is for the build.
set(ENV{LIBRARY_PATH} "${cuda_root}/lib:$ENV{LIBRARY_PATH}")
link_directories("${cuda_root}/lib")
