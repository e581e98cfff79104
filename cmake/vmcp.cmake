# Helpers for the folders' CMakeLists.txt:
#
#   vmcp_library(NAME SOURCES file... [DEPENDS target...])      a static library of one folder
#   vmcp_executable(NAME SOURCES file... [DEPENDS target...])   a program, installed
#   vmcp_unit_test(NAME SOURCES foo_test.c... [DEPENDS target...] [LABELS label...])   Criterion
#   vmcp_plain_test(NAME SOURCES foo_test.c... [DEPENDS target...] [LABELS label...])  main() with tests/lib/check.h
#
# DEPENDS are targets of this project or imported ones; they are linked PUBLIC, so that a folder links
# what its header's users need. Test programs are never linked with LTO or --gc-sections: Criterion
# finds its tests in a linker section, which both of these empty without a word.

find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)

set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS ON) # gnu11: statement expressions, typeof and the cleanup attribute
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

if(NOT CMAKE_BUILD_TYPE)
	set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "" FORCE)
endif()
# Without NDEBUG: an assertion that is not in the product is not tested either.
set(CMAKE_C_FLAGS_RELWITHDEBINFO "-O2 -g")
set(CMAKE_C_FLAGS_DEBUG "-Og -g")

set(VMCP_WARNINGS -Wall -Wextra -Wshadow -Wsign-compare -Wconversion -Wstrict-prototypes -Wmissing-prototypes -Wvla
	-Werror)
if(CMAKE_C_COMPILER_ID MATCHES Clang)
	list(APPEND VMCP_WARNINGS -Wno-gnu-variable-sized-type-not-at-end)
endif()

set(VMCP_SANITIZE_FLAGS "")
if(VMCP_SANITIZE)
	set(VMCP_SANITIZE_FLAGS -fsanitize=${VMCP_SANITIZE} -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
	# The fences of the rings order accesses to the guest's memory, which the sanitizer does not see anyway.
	if(VMCP_SANITIZE MATCHES thread)
		list(APPEND VMCP_SANITIZE_FLAGS -Wno-tsan)
	endif()
endif()

if(VMCP_FUZZ)
	list(APPEND VMCP_SANITIZE_FLAGS -fsanitize=fuzzer-no-link)
endif()

if(VMCP_TESTS)
	pkg_check_modules(CRITERION IMPORTED_TARGET criterion)
	if(NOT CRITERION_FOUND)
		message(FATAL_ERROR "The tests need Criterion (Debian: libcriterion-dev). "
			"Install it, or configure with -DVMCP_TESTS=OFF to build without tests.")
	endif()
endif()

function(_vmcp_compile_options NAME)
	target_compile_options(${NAME} PRIVATE ${VMCP_WARNINGS} ${VMCP_SANITIZE_FLAGS} -fstack-protector-strong)
	target_compile_definitions(${NAME} PRIVATE _GNU_SOURCE VMCP_VERSION="${PROJECT_VERSION}")
	target_include_directories(${NAME} PRIVATE ${PROJECT_SOURCE_DIR})
	target_link_options(${NAME} PRIVATE ${VMCP_SANITIZE_FLAGS})
endfunction()

function(vmcp_library NAME)
	cmake_parse_arguments(PARSE_ARGV 1 A "" "" "SOURCES;DEPENDS")
	add_library(${NAME} STATIC ${A_SOURCES})
	_vmcp_compile_options(${NAME})
	target_link_libraries(${NAME} PUBLIC ${A_DEPENDS} Threads::Threads)
endfunction()

function(vmcp_executable NAME)
	cmake_parse_arguments(PARSE_ARGV 1 A "" "" "SOURCES;DEPENDS")
	add_executable(${NAME} ${A_SOURCES})
	_vmcp_compile_options(${NAME})
	target_link_libraries(${NAME} PRIVATE ${A_DEPENDS} Threads::Threads)
	install(TARGETS ${NAME} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endfunction()

function(_vmcp_test NAME RUNNER LIBRARY)
	cmake_parse_arguments(PARSE_ARGV 3 A "" "" "SOURCES;DEPENDS;LABELS")
	add_executable(${NAME} ${A_SOURCES})
	_vmcp_compile_options(${NAME})
	target_compile_options(${NAME} PRIVATE -fno-lto)
	target_link_options(${NAME} PRIVATE -fno-lto -Wl,--no-gc-sections)
	target_link_libraries(${NAME} PRIVATE ${A_DEPENDS} ${LIBRARY} Threads::Threads)
	list(TRANSFORM A_SOURCES PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/)
	add_test(NAME ${NAME} COMMAND ${PROJECT_SOURCE_DIR}/tests/lib/${RUNNER} $<TARGET_FILE:${NAME}> ${A_SOURCES})
	set_tests_properties(${NAME} PROPERTIES TIMEOUT 900 LABELS "${A_LABELS}")
endfunction()

function(vmcp_unit_test NAME)
	if(NOT VMCP_TESTS)
		return()
	endif()
	if(VMCP_SANITIZE MATCHES "thread")
		message(STATUS "SKIP ${NAME}: Criterion does not start under ThreadSanitizer (plain tests do)")
		return()
	endif()
	_vmcp_test(${NAME} run_criterion.sh PkgConfig::CRITERION ${ARGN})
endfunction()

function(vmcp_plain_test NAME)
	if(VMCP_TESTS)
		_vmcp_test(${NAME} run_plain.sh "" ${ARGN})
	endif()
endfunction()
