# Everything that must pass before a commit, as CI runs it.
check:
    .ci/run

# README's two commands.
quickstart:
    cargo run --release --example quickstart
test:
    cargo test --workspace --locked

# The bundled base, from nothing: text, tokenizer, training (about twenty minutes on two cores).
base:
    cargo run --release --example make_data -- --out target/base-data --megabytes 40
    cargo run --release -- pretrain --shape examples/base/shape.toml --data target/base-data/base.jsonl \
        --out examples/base/model --batch-size 8 --length 256 --steps 3400 --learning-rate 3e-3 --warmup-steps 100 \
        --eval-every 500 --eval-fraction 0.002

# The program for NVIDIA GPUs (CUDA_HOME names the toolkit), and its tests on a machine without one.
cuda:
    CUDA_COMPUTE_CAP=80 cargo build --release --features cuda
cuda-stand-in:
    tests/cuda_stand_in/build.sh target/cuda_stand_in
    python3 tests/cuda_stand_in/check_kernels.py
    LD_LIBRARY_PATH=target/cuda_stand_in XDG_CACHE_HOME=target/cuda_stand_in/cache \
        CUDA_COMPUTE_CAP=80 cargo test --release --features cuda --lib --test cuda -- --include-ignored

# The fixtures of tests/golden, made with transformers and PEFT.
golden python="python3":
    {{python}} tests/golden/make_golden.py
