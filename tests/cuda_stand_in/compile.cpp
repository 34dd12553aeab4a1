// Compiling CUDA C++ for the stand-in; see compile.h.

#include "compile.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <glob.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cctype>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>

extern char** environ;

namespace stand_in {
namespace {

const char module_heading[] = "// cuda stand-in: kernels in ";

std::string environment(const char* name, const std::string& otherwise) {
    const char* value = std::getenv(name);
    return value && *value ? value : otherwise;
}

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

bool write_file(const std::string& path, const std::string& text) {
    std::ofstream file(path, std::ios::binary);
    file << text;
    return bool(file.flush());
}

bool exists(const std::string& path) { return access(path.c_str(), R_OK) == 0; }

// The folder of the headers, which build.sh puts beside the libraries.
std::string find_header_folder() {
    Dl_info info;
    char library[PATH_MAX];
    if (!dladdr(reinterpret_cast<const void*>(&find_header_folder), &info) || !realpath(info.dli_fname, library)) return "headers";
    return std::string(library, std::strrchr(library, '/')) + "/headers";
}
// Found when the library is loaded, since its path may be relative to the folder of that moment.
const std::string header_folder = find_header_folder();

std::string cache_folder() {
    std::string folder = environment("STAND_IN_CACHE", "");
    if (folder.empty()) {
        folder = environment("TMPDIR", "/tmp") + "/cuda-stand-in-" + std::to_string(getuid());
    }
    mkdir(folder.c_str(), 0700);
    return folder;
}

// FNV-1a over 64 bits, from two starting points: the cache is trusted, so this only has to tell texts apart.
std::string hash(const std::string& text) {
    std::string name;
    for (uint64_t state : {0xcbf29ce484222325ull, 0x84222325cbf29ce4ull}) {
        for (unsigned char byte : text) state = (state ^ byte) * 0x100000001b3ull;
        char digits[17];
        std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(state));
        name += digits;
    }
    return name;
}

// Runs a program with its messages in the file `log`; true if it ends well.
bool run(const std::vector<std::string>& words, const std::string& log) {
    std::vector<char*> arguments;
    for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 2, 1);
    pid_t child;
    const int error = posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    if (error != 0) {
        write_file(log, "cannot run `" + words[0] + "`: " + std::strerror(error) + "\n");
        return false;
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// `extern __shared__ T name[];` has no counterpart among the macros of stand_in.h.
std::string with_dynamic_shared_memory(const std::string& source) {
    static const std::regex declaration(
        R"(extern\s+__shared__\s+(?:__align__\s*\(\s*\d+\s*\)\s*)?([A-Za-z_][A-Za-z_0-9 ]*[ *])\s*([A-Za-z_]\w*)\s*\[\s*\]\s*;)");
    std::string result;
    size_t start = 0;
    while (start < source.size()) {
        size_t end = source.find('\n', start);
        end = end == std::string::npos ? source.size() : end + 1;
        const std::string line = source.substr(start, end - start);
        const bool declares = line.find("__shared__") != std::string::npos && line.find("extern") != std::string::npos;
        result += declares ? std::regex_replace(line, declaration, "SHARED_MEMORY($1, $2);") : line;
        start = end;
    }
    return result;
}

size_t after_space(const std::string& text, size_t position) {
    while (position < text.size() && std::isspace(static_cast<unsigned char>(text[position]))) ++position;
    return position;
}

bool is_word(char letter) { return std::isalnum(static_cast<unsigned char>(letter)) || letter == '_'; }

// The names of the `extern "C" __global__` functions in a preprocessed text, in order of their first appearance.
std::vector<std::string> kernel_names(const std::string& text) {
    const std::string linkage = "extern \"C\"";
    std::vector<std::string> names;
    std::set<std::string> seen;
    for (size_t at = text.find(linkage); at != std::string::npos; at = text.find(linkage, at + 1)) {
        size_t position = after_space(text, at + linkage.size());
        bool kernel = false;
        std::string word;
        // Words and attributes up to the parameters; whatever else comes is no function.
        while (position < text.size()) {
            if (text[position] == '(') {
                if (word != "__attribute__") break;
                const size_t opened = position;
                int depth = 0;
                do {
                    depth += text[position] == '(' ? 1 : text[position] == ')' ? -1 : 0;
                    ++position;
                } while (depth > 0 && position < text.size());
                kernel |= text.compare(opened, position - opened, "((used))") == 0;
                word.clear();
            } else if (is_word(text[position])) {
                const size_t first = position;
                while (position < text.size() && is_word(text[position])) ++position;
                word = text.substr(first, position - first);
            } else {
                word.clear();
                break;
            }
            position = after_space(text, position);
        }
        if (kernel && !word.empty() && seen.insert(word).second) names.push_back(word);
    }
    return names;
}

// What lets the driver find and launch the kernels of a library.
std::string exports(const std::vector<std::string>& names) {
    std::string text = "\n# 1 \"exports of the stand-in\"\nstatic const stand_in::Kernel stand_in_table[] = {\n";
    for (const std::string& name : names) text += "    stand_in::describe(\"" + name + "\", " + name + "),\n";
    text += "    {nullptr, nullptr, nullptr, 0}};\n";
    text += "extern \"C\" __attribute__((visibility(\"default\"))) const stand_in::Kernel* stand_in_kernels() {"
            " return stand_in_table; }\n";
    text += "extern \"C\" __attribute__((visibility(\"default\"))) void stand_in_launch(const stand_in::Kernel* kernel,"
            " const unsigned* grid, const unsigned* block, unsigned long shared_bytes, void** parameters) {"
            " stand_in::launch(*kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),"
            " shared_bytes, parameters); }\n";
    text += "extern \"C\" __attribute__((visibility(\"default\"))) void stand_in_position(unsigned* position) {"
            " const stand_in::Machine& machine = stand_in::Machine::get();"
            " const uint3 block = machine.block_index, thread = machine.thread_index;"
            " for (unsigned number : {block.x, block.y, block.z, thread.x, thread.y, thread.z}) *position++ = number; }\n";
    return text;
}

}  // namespace

CompileResult compile(const CompileRequest& request) {
    const std::string& headers = header_folder;
    const std::string compiler = environment("CXX", "c++");
    const std::string source = with_dynamic_shared_memory(request.source);

    std::string identity = compiler + '\0' + source + '\0' + read_file(headers + "/stand_in.h") +
                           read_file(headers + "/small_floats.h") + read_file(headers + "/bits.h");
    for (const std::string& option : request.options) identity += '\0' + option;
    for (const auto& [name, text] : request.headers) identity += '\0' + name + '\0' + text;
    const std::string base = cache_folder() + "/" + hash(identity);
    const std::string library = base + ".so";
    if (exists(library)) return {library, ""};

    // Several threads and processes may be at the same file; the last one to rename wins, with the same contents.
    static std::atomic<unsigned> turn{0};
    const std::string mine = base + "." + std::to_string(getpid()) + "." + std::to_string(turn++);
    const std::string folder = mine + ".headers", text = mine + ".cu", expanded = mine + ".ii", built = mine + ".so", log = mine + ".log";
    mkdir(folder.c_str(), 0700);
    for (const auto& [name, contents] : request.headers) write_file(folder + "/" + name, contents);
    write_file(text, "# 1 \"" + request.name + "\"\n" + source);

    std::vector<std::string> preprocess = {compiler, "-std=c++17", "-E", "-w", "-x", "c++", "-I", folder, "-I", headers + "/include"};
    preprocess.insert(preprocess.end(), request.options.begin(), request.options.end());
    for (const std::string& word : {std::string("-include"), headers + "/stand_in.h", text, std::string("-o"), expanded}) {
        preprocess.push_back(word);
    }
    CompileResult result;
    if (run(preprocess, log)) {
        const std::string preprocessed = read_file(expanded);
        write_file(expanded, preprocessed + exports(kernel_names(preprocessed)));
        // Optimised lightly: kernels are compiled once for each test run, and the models of tests are tiny.
        if (run({compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w", "-fvisibility=hidden",
                 "-fvisibility-inlines-hidden", "-x", "c++-cpp-output", expanded, "-o", built},
                log) &&
            std::rename(built.c_str(), library.c_str()) == 0) {
            result.library = library;
        }
    }
    result.log = read_file(log);
    for (const auto& [name, contents] : request.headers) unlink((folder + "/" + name).c_str());
    rmdir(folder.c_str());
    for (const std::string& path : {text, expanded, built, log}) unlink(path.c_str());
    if (result.library.empty() && result.log.empty()) result.log = "cannot write `" + library + "`\n";
    return result;
}

std::string module_text(const std::string& library) { return module_heading + library + "\n"; }

std::string library_of_module(const std::string& text) {
    const size_t length = sizeof module_heading - 1;
    if (text.compare(0, length, module_heading) != 0) return "";
    return text.substr(length, text.find('\n', length) - length);
}

CompileResult compile_candle_module(const std::string& ptx) {
    std::set<std::string> entries;
    const std::string mark = ".entry ";
    for (size_t at = ptx.find(mark); at != std::string::npos; at = ptx.find(mark, at + 1)) {
        const size_t first = at + mark.size();
        size_t end = first;
        while (end < ptx.size() && is_word(ptx[end])) ++end;
        entries.insert(ptx.substr(first, end - first));
    }
    const std::string cargo = environment("CARGO_HOME", environment("HOME", "") + "/.cargo");
    const std::string folders = environment("STAND_IN_CANDLE_KERNELS", cargo + "/registry/src/*/candle-kernels-*/src");
    glob_t found{};
    std::string best;
    size_t most = 0;
    if (glob((folders + "/*.cu").c_str(), 0, nullptr, &found) == 0) {
        for (size_t index = 0; index < found.gl_pathc; ++index) {
            const std::string source = read_file(found.gl_pathv[index]);
            size_t matches = 0;
            for (size_t position = 0; position < source.size();) {
                size_t end = position;
                while (end < source.size() && is_word(source[end])) ++end;
                const std::string word = source.substr(position, end - position);
                position = end + word.empty();
                if (word.empty()) continue;
                // A macro may make a name of two halves: a first half that fits counts little.
                const auto entry = entries.lower_bound(word);
                const bool begins = entry != entries.end() && word.back() == '_' && entry->compare(0, word.size(), word) == 0;
                matches += entries.count(word) ? 1000 : begins;
            }
            if (matches >= most && matches > 0) {
                most = matches;
                best = found.gl_pathv[index];
            }
        }
    }
    globfree(&found);
    if (best.empty()) return {"", "no file of `" + folders + "` has the kernels of this PTX\n"};
    CompileRequest request;
    request.source = read_file(best);
    request.name = best;
    request.options = {"-DSTAND_IN_LENIENT", "-I", best.substr(0, best.rfind('/'))};
    return compile(request);
}

}  // namespace stand_in
