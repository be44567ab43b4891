# `cmake --install` installs the library, the headers, the CMake package and the pkg-config file.
# All of them are relocatable. Destinations follow GNUInstallDirs.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS leetcore EXPORT leetcoreTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/cpp/include/leetcore DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/leetcore)
install(EXPORT leetcoreTargets NAMESPACE leetcore:: DESTINATION ${package_dir})
get_target_property(leetcore_type leetcore TYPE)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/leetcoreConfig.cmake.in ${PROJECT_BINARY_DIR}/leetcoreConfig.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/leetcoreConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/leetcoreConfig.cmake ${PROJECT_BINARY_DIR}/leetcoreConfigVersion.cmake
  DESTINATION ${package_dir})

# The paths of the pkg-config file are relative to the file, so the installation may be moved.
file(RELATIVE_PATH pc_to_prefix ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
file(RELATIVE_PATH pc_libdir ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_LIBDIR})
file(RELATIVE_PATH pc_includedir ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_INCLUDEDIR})
set(pc_private "-lstdc++ -lm -pthread -ldl")
configure_file(${CMAKE_CURRENT_LIST_DIR}/leetcore.pc.in ${PROJECT_BINARY_DIR}/leetcore.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/leetcore.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
