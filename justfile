# Everything that must pass before a commit, as CI runs it.
check:
    .ci/run

# README's two commands.
quickstart:
    cargo run --release --example quickstart
test:
    cargo test --workspace --locked

# The bundled base, from nothing: text, tokenizer, training (about half an hour on two cores).
base:
    cargo run --release --example make_data -- --out target/base-data --megabytes 30
    cargo run --release -- pretrain --shape examples/base/shape.toml --data target/base-data/base.jsonl --out target/base

# The fixtures of tests/golden, made with transformers and PEFT.
golden python="python3":
    {{python}} tests/golden/make_golden.py
