// The stand-in's libnvrtc: programs are compiled by the system's C++ compiler.

#include <nvrtc.h>

#include <cstring>

#include "compile.h"

struct _nvrtcProgram {
    stand_in::CompileRequest request;
    std::string log, code;
    bool compiled = false;
};

namespace {

nvrtcResult give_text(const std::string& text, char* into) {
    if (!into) return NVRTC_ERROR_INVALID_INPUT;
    std::memcpy(into, text.c_str(), text.size() + 1);
    return NVRTC_SUCCESS;
}

nvrtcResult give_size(const std::string& text, size_t* size) {
    if (!size) return NVRTC_ERROR_INVALID_INPUT;
    *size = text.size() + 1;
    return NVRTC_SUCCESS;
}

bool starts_with(const std::string& text, const char* start) { return text.compare(0, std::strlen(start), start) == 0; }

// Of NVRTC's options those that mean something to the C++ compiler: macros. Include paths are left out, since they lead
// to the toolkit's headers, in whose place the stand-in has its own.
std::vector<std::string> compiler_options(int count, const char* const* options) {
    std::vector<std::string> kept;
    for (int index = 0; index < count; ++index) {
        const std::string option = options[index];
        const bool alone = option == "-D" || option == "--define-macro" || option == "-U" || option == "--undefine-macro";
        std::string macro;
        if (alone && index + 1 < count) {
            macro = options[++index];
        } else if (starts_with(option, "--define-macro=") || starts_with(option, "--undefine-macro=")) {
            macro = option.substr(option.find('=') + 1);
        } else if (starts_with(option, "-D") || starts_with(option, "-U")) {
            macro = option.substr(2);
        }
        const bool removes = starts_with(option, "-U") || starts_with(option, "--undefine-macro");
        if (!macro.empty()) kept.push_back((removes ? "-U" : "-D") + macro);
    }
    return kept;
}

}  // namespace

extern "C" {

const char* nvrtcGetErrorString(nvrtcResult result) {
    switch (result) {
        case NVRTC_SUCCESS: return "NVRTC_SUCCESS";
        case NVRTC_ERROR_INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
        case NVRTC_ERROR_INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
        case NVRTC_ERROR_COMPILATION: return "NVRTC_ERROR_COMPILATION";
        default: return "NVRTC_ERROR unknown to the stand-in";
    }
}

nvrtcResult nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetNumSupportedArchs(int* count) {
    *count = 2;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetSupportedArchs(int* architectures) {
    architectures[0] = 80;
    architectures[1] = 90;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcCreateProgram(nvrtcProgram* program, const char* source, const char* name, int header_count,
                               const char* const* headers, const char* const* header_names) {
    if (!program || !source) return NVRTC_ERROR_INVALID_INPUT;
    *program = new _nvrtcProgram;
    (*program)->request.source = source;
    (*program)->request.name = name && *name ? name : "default_program";
    for (int index = 0; index < header_count; ++index) {
        (*program)->request.headers.emplace_back(header_names[index], headers[index]);
    }
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcDestroyProgram(nvrtcProgram* program) {
    if (!program || !*program) return NVRTC_ERROR_INVALID_PROGRAM;
    delete *program;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcCompileProgram(nvrtcProgram program, int option_count, const char* const* options) {
    if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
    program->request.options = compiler_options(option_count, options);
    const stand_in::CompileResult result = stand_in::compile(program->request);
    program->log = result.log;
    program->compiled = !result.library.empty();
    if (!program->compiled) return NVRTC_ERROR_COMPILATION;
    program->code = stand_in::module_text(result.library);
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram program, size_t* size) {
    return program ? give_size(program->log, size) : NVRTC_ERROR_INVALID_PROGRAM;
}

nvrtcResult nvrtcGetProgramLog(nvrtcProgram program, char* log) {
    return program ? give_text(program->log, log) : NVRTC_ERROR_INVALID_PROGRAM;
}

nvrtcResult nvrtcGetPTXSize(nvrtcProgram program, size_t* size) {
    return program && program->compiled ? give_size(program->code, size) : NVRTC_ERROR_INVALID_PROGRAM;
}

nvrtcResult nvrtcGetPTX(nvrtcProgram program, char* code) {
    return program && program->compiled ? give_text(program->code, code) : NVRTC_ERROR_INVALID_PROGRAM;
}

nvrtcResult nvrtcGetCUBINSize(nvrtcProgram program, size_t* size) { return nvrtcGetPTXSize(program, size); }

nvrtcResult nvrtcGetCUBIN(nvrtcProgram program, char* code) { return nvrtcGetPTX(program, code); }

}  // extern "C"
