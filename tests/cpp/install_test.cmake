#Installs the build, moves it, and builds and runs cpp / examples against it : with CMake, then with pkg - config.
set(work ${BUILD} / install_test) file(REMOVE_RECURSE ${work})

    function(run) execute_process(COMMAND ${
        ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output) if (NOT result EQUAL 0)
        string(JOIN " " command ${ARGN}) message(FATAL_ERROR "${command}: ${result}\n${output}") endif()
            set(output "${output}" PARENT_SCOPE) endfunction()

                run(
                    $ { CMAKE_COMMAND } --install $ { BUILD } --prefix ${work} / first) set(prefix "${work}/a präfix")
                    file(RENAME ${work} / first "${prefix}")
                        file(GLOB_RECURSE config "${prefix}/*/leetcoreConfig.cmake") file(GLOB_RECURSE pc
                                                                                          "${prefix}/*/leetcore.pc")
                            file(STRINGS "${pc}" described REGEX "^Description: .+") if (NOT described)
                                message(FATAL_ERROR "${pc}: no description") endif()
                                    get_filename_component(pc_dir "${pc}" DIRECTORY)
                                        get_filename_component(lib_dir "${pc_dir}" DIRECTORY)

                                            run(${CMAKE_COMMAND} - S ${EXAMPLES} - B ${work} / cmake - G ${GENERATOR} -
                                                    D CMAKE_C_COMPILER = ${CC} - D CMAKE_CXX_COMPILER =
                                                                             $ { CXX } "-D CMAKE_PREFIX_PATH=${prefix}")
                                                run($ { CMAKE_COMMAND } --build ${work} / cmake)
                                                    foreach (program forward decode) run(${work} / cmake / ${program})
                                                        message("${output}")
                                                            endforeach() if (EXISTS ${work} / cmake /
                                                                             gpu) #where there is a CUDA compiler
    execute_process(COMMAND ${work} / cmake /
                    gpu RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output) if (NOT result MATCHES
                                                                                                 "^(0|77)$") #77
    : no GPU message(FATAL_ERROR "gpu: ${result}\n${output}") endif() message("${output}") endif()

          find_program(PKG_CONFIG NAMES pkg - config pkgconf REQUIRED) set(ENV { PKG_CONFIG_PATH } "${pc_dir}")
              set(ENV { LD_LIBRARY_PATH } "${lib_dir}") run($ { PKG_CONFIG } --exact - version = ${VERSION} leetcore)
                  run($ { PKG_CONFIG } --cflags-- libs-- static leetcore)
                      separate_arguments(flags UNIX_COMMAND "${output}")
                          foreach (compile
                                   "${CC};-std=c99;${EXAMPLES}/forward.c;-lm"
                                   "${CXX};-std=c++17;${EXAMPLES}/decode.cpp")
                              run(${compile} - Wall - Wextra - pedantic - Werror - o ${work} / program ${flags})
                                  run(${work} / program) message("${output}") endforeach()
