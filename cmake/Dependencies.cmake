# What lesskv stands on; tools/install_packages.sh lists the Debian packages.
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED)  # the pool inside oneDNN; lesskv has its own, base/threads.h
find_package(fmt REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
# Not find_package(dnnl): Debian's file asks for OpenCL headers, which only oneDNN's GPU interface needs.
find_path(DNNL_INCLUDE_DIR dnnl.hpp REQUIRED)
find_library(DNNL_LIBRARY dnnl REQUIRED)
add_library(DNNL::dnnl UNKNOWN IMPORTED)
set_target_properties(DNNL::dnnl PROPERTIES IMPORTED_LOCATION ${DNNL_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${DNNL_INCLUDE_DIR})
# Headers alone: inverses and eigenvectors of small matrices.
find_path(EIGEN_INCLUDE_DIR Eigen/Core PATH_SUFFIXES eigen3 REQUIRED)
add_library(lesskv_eigen INTERFACE)
target_include_directories(lesskv_eigen SYSTEM INTERFACE ${EIGEN_INCLUDE_DIR})
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(LIBEDIT REQUIRED IMPORTED_TARGET libedit)  # lines typed in lesskv chat; readline would be under the GPL
# lesskv serve; header and library of Debian, built with TLS and compression, which the server does not use.
pkg_check_modules(HTTPLIB REQUIRED IMPORTED_TARGET cpp-httplib)
pkg_check_modules(HIREDIS REQUIRED IMPORTED_TARGET hiredis)  # lesskv serve: conversations that replicas share
if(LESSKV_BUILD_TESTS)
  find_package(GTest REQUIRED)
endif()
if(LESSKV_BUILD_BENCH)
  find_package(benchmark REQUIRED)
endif()
