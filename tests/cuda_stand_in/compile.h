// Compiling CUDA C++ for the stand-in: the text of a `.cu` file becomes a shared library for the CPU.

#pragma once

#include <string>
#include <vector>

namespace stand_in {

struct CompileRequest {
    // The text of the file, and the name under which messages speak of it.
    std::string source, name;
    // Options for the C++ compiler, such as `-DREAL=float`.
    std::vector<std::string> options;
    // Texts of files that the source includes, by name.
    std::vector<std::pair<std::string, std::string>> headers;
};

struct CompileResult {
    // Path of the library; empty if the text does not compile, and then `log` says why.
    std::string library, log;
};

// Compiles with `$CXX` (`c++` if not set) or takes the result from the folder `$STAND_IN_CACHE`, where a library is named
// after a hash of all that it was made from.
CompileResult compile(const CompileRequest& request);

// What the stand-in's NVRTC gives for PTX and for machine code: text that names a library.
std::string module_text(const std::string& library);

// The library that `text` names, or nothing if it is no such text.
std::string library_of_module(const std::string& text);

// The library made from candle's own kernels, given the PTX that candle embeds: of the `.cu` files of the candle-kernels
// crate the one that has the entry points of the PTX.
CompileResult compile_candle_module(const std::string& ptx);

}  // namespace stand_in
