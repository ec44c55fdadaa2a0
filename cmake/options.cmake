# Flags that hold for every translation unit.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra> $<$<COMPILE_LANGUAGE:CXX>:-Wno-unknown-pragmas>)
# A fused multiply-add where one is written and nowhere else: results must not depend on the compiler's mood.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)

if(REPKERN_SANITIZE)
  # Full optimization takes three times as long to compile here and hides nothing that the checks look for.
  set(CMAKE_CXX_FLAGS_RELEASE "-O1")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=address,undefined>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=undefined>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer> $<$<COMPILE_LANGUAGE:CXX>:-g>)
  add_link_options(-fsanitize=address,undefined)
endif()

function(repkern_add_module name)
  # NO_EXTRAS: no link-time optimization, which would mix code built for different instruction sets.
  pybind11_add_module(${name} MODULE NO_EXTRAS csrc/bind/module.cpp ${ARGN})
  target_include_directories(${name} PRIVATE csrc)
  target_compile_definitions(${name} PRIVATE REPKERN_MODULE_NAME=${name})
endfunction()
