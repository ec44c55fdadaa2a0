# repkern_add_op(<op>): picks the files of csrc/<op> by suffix.
#   *_bind.cpp   pybind11 bindings           -> every module
#   *_cpu.cpp    scalar code and dispatch    -> _C
#   *_<isa>.cpp  see isa_flags.cmake         -> _C
#   *_cuda.cu    CUDA                        -> _C when CUDA is on; through the host compiler -> _C_simt
function(repkern_add_op op)
  set(dir "${CMAKE_CURRENT_SOURCE_DIR}/csrc/${op}")
  file(GLOB bind CONFIGURE_DEPENDS "${dir}/*_bind.cpp")
  file(GLOB cpu CONFIGURE_DEPENDS "${dir}/*_cpu.cpp")
  file(GLOB cuda CONFIGURE_DEPENDS "${dir}/*_cuda.cu")
  target_sources(_C PRIVATE ${bind} ${cpu})

  foreach(isa IN LISTS REPKERN_ISA_SUFFIXES)
    file(GLOB isa_files CONFIGURE_DEPENDS "${dir}/*_${isa}.cpp")
    set_source_files_properties(${isa_files} PROPERTIES COMPILE_OPTIONS "${REPKERN_ISA_FLAGS_${isa}}")
    target_sources(_C PRIVATE ${isa_files})
  endforeach()

  if(REPKERN_CUDA_ENABLED)
    target_sources(_C PRIVATE ${cuda})
  endif()
  if(REPKERN_SIMT)
    # A wrapper per file: the same source cannot be both CUDA and C++ in one directory.
    foreach(file IN LISTS cuda)
      get_filename_component(name "${file}" NAME_WE)
      set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/simt/${name}.cpp")
      file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"${file}\"\n")
      target_sources(_C_simt PRIVATE "${wrapper}")
    endforeach()
    target_sources(_C_simt PRIVATE ${bind})
  endif()
endfunction()
