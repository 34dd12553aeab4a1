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

# The fixtures of tests/golden, made with transformers and PEFT.
golden python="python3":
    {{python}} tests/golden/make_golden.py
