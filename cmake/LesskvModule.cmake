# lesskv_module(NAME [COLD] [DEPS targets...] [PRIVATE_DEPS targets...])
#
# Makes the static library lesskv_NAME from every .cpp file of the current folder (and its stage folders), and the test
# program NAME_test from every *_test.cpp beside them. A new source file needs no line here: it is found when it is added.
#
# A module's headers are found through a folder of their own, and only by the targets that link the module: an include
# against the arrows of docs/overview.md does not compile.
include(GoogleTest)

add_library(lesskv_flags INTERFACE)
target_compile_options(lesskv_flags INTERFACE -Wall -Wextra -Wshadow -Werror)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC 12 reports these falsely for std::vector and std::string at -O3; they depend on inlining, so they are no errors.
  target_compile_options(lesskv_flags INTERFACE -Wno-stringop-overflow -Wno-stringop-overread -Wno-array-bounds
                                                -Wno-restrict -Wno-error=maybe-uninitialized)
endif()
if(LESSKV_SANITIZE)
  target_compile_options(lesskv_flags INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=undefined
                                                -fno-omit-frame-pointer)
  target_link_options(lesskv_flags INTERFACE -fsanitize=address,undefined)
endif()

if(LESSKV_FUZZ)
  target_compile_options(lesskv_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()

# For code that parses, prints and waits, and for tests: it takes longer to compile than it ever runs.
add_library(lesskv_cold_flags INTERFACE)
target_compile_options(lesskv_cold_flags INTERFACE $<$<CONFIG:Release>:-O1> $<$<CONFIG:Debug>:-O0>)

if(LESSKV_BUILD_TESTS)
  add_library(lesskv_test_main STATIC ${PROJECT_SOURCE_DIR}/tests/test_main.cpp)
  target_link_libraries(lesskv_test_main PUBLIC lesskv_flags GTest::gtest PRIVATE lesskv_cold_flags)
endif()

# SLOW: label of tests of whole models, which sanitizers would take minutes for and learn nothing new from.
# Test programs learn where the checkout is, and through LESSKV_SHARED_DIR where optional shared data lies.
# On a busy machine a program may need longer than CMake's five seconds to list its tests.
function(lesskv_test NAME)
  cmake_parse_arguments(ARG "SLOW" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${NAME} ${ARG_SOURCES})
  target_link_libraries(${NAME} PRIVATE lesskv_flags lesskv_cold_flags ${ARG_DEPS} lesskv_test_main)
  target_compile_definitions(${NAME} PRIVATE LESSKV_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  if(ARG_SLOW)
    set(labels LABELS slow)
  endif()
  gtest_discover_tests(${NAME} DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 300 PROPERTIES TIMEOUT 600 ${labels})
endfunction()

function(lesskv_module NAME)
  cmake_parse_arguments(ARG "COLD" "" "DEPS;PRIVATE_DEPS" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS *.cpp)
  set(tests ${sources})
  list(FILTER tests INCLUDE REGEX "_test\\.cpp$")
  list(FILTER sources EXCLUDE REGEX "_test\\.cpp$")
  set(include_root ${PROJECT_BINARY_DIR}/include/${NAME})
  file(MAKE_DIRECTORY ${include_root})
  file(CREATE_LINK ${CMAKE_CURRENT_SOURCE_DIR} ${include_root}/${NAME} SYMBOLIC)
  add_library(lesskv_${NAME} STATIC ${sources})
  target_include_directories(lesskv_${NAME} PUBLIC ${include_root})
  target_link_libraries(lesskv_${NAME} PUBLIC lesskv_flags ${ARG_DEPS} PRIVATE ${ARG_PRIVATE_DEPS}
                                            $<$<BOOL:${ARG_COLD}>:lesskv_cold_flags>)
  if(LESSKV_BUILD_TESTS AND tests)
    lesskv_test(${NAME}_test SOURCES ${tests} DEPS lesskv_${NAME})
  endif()
endfunction()
