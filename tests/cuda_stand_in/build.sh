#!/bin/sh
# Builds the stand-in's libraries: build.sh FOLDER
#
# CUDA_HOME is the toolkit that `cargo build --features cuda` links with. Its headers declare what is defined here, and
# each library takes the name, the version and all the symbols of the toolkit's. A symbol that the stand-in does not
# define says so on stderr when it is called, and answers "not supported".
set -eu
out=$1
here=$(cd "$(dirname "$0")" && pwd)
toolkit=${CUDA_HOME:?the folder of the CUDA toolkit}
compiler=${CXX:-c++}
mkdir -p "$out/headers/include"
out=$(cd "$out" && pwd)
cp "$here/stand_in.h" "$here/small_floats.h" "$here/bits.h" "$out/headers/"
cp -r "$here/include/." "$out/headers/include/"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The first of the given files that exists.
first() {
    for file in "$@"; do
        if [ -e "$file" ]; then
            echo "$file"
            return
        fi
    done
    echo "build.sh: none of $* is there" >&2
    exit 1
}

# library NAME RESULT_OF_MISSING OPTIONS SOURCES...: builds libNAME.
library() {
    name=$1 missing=$2 options=$3
    shift 3
    original=$(first "$toolkit/lib/lib$name".so.[0-9]* "$toolkit/lib64/lib$name".so.[0-9]* \
        "$toolkit/lib/stubs/lib$name.so" "$toolkit/lib64/stubs/lib$name.so")
    soname=$(readelf -d "$original" | sed -n 's/.*SONAME.*\[\(.*\)\]/\1/p')
    objects=
    for source in "$@"; do
        object=$work/$name.$source.o
        $compiler -std=c++17 -O2 -ffp-contract=off -fPIC -fvisibility=default -Wall -Wextra -Wno-deprecated-declarations \
            -I "$toolkit/include" -c "$here/$source" -o "$object"
        objects="$objects $object"
    done
    nm -D --defined-only "$original" | sed -n 's/^[0-9a-f]* [TWi] \([A-Za-z_0-9]*\).*/\1/p' | sort -u >"$work/all"
    # shellcheck disable=SC2086
    (test -z "$objects" || nm --defined-only $objects) | sed -n 's/^[0-9a-f]* T //p' | sort -u >"$work/defined"
    cat >"$work/missing.c" <<END
#include <stdio.h>
static int missing(const char* name) {
    fprintf(stderr, "cuda stand-in: \`%s\` is not supported\\n", name);
    return $missing;
}
#define MISSING(name) int name(void) { return missing(#name); }
END
    comm -23 "$work/all" "$work/defined" | sed 's/.*/MISSING(&)/' >>"$work/missing.c"
    $compiler -x c -O1 -fPIC -w -c "$work/missing.c" -o "$work/missing.o"
    # The toolkit's libraries, except the driver, have all symbols in one version of their own name.
    case $name in
        cuda) version= ;;
        *) version=$soname ;;
    esac
    echo "$version { global: cu*; nvrtc*; __cu*; __nv*; local: *; };" >"$work/versions"
    # shellcheck disable=SC2086
    $compiler -shared $objects "$work/missing.o" -Wl,-soname,"$soname" -Wl,--version-script,"$work/versions" \
        -L "$out" -Wl,-rpath,'$ORIGIN' $options -ldl -lpthread -o "$out/$soname"
}

library cuda 801 "" driver.cpp compile.cpp
library nvrtc 11 "" compiler.cpp compile.cpp
library cublas 15 "-l:libcuda.so.1" blas.cpp
library cublasLt 15 ""
library curand 999 "" random.cpp
library cudart 801 "" runtime.cpp
