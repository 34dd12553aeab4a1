//! Checkpoints written by the safetensors crate, whole, sharded, damaged and hostile.

use super::*;
use proptest::prelude::*;
use safetensors::tensor::TensorView as Raw;
use serde_json::json;
use std::collections::HashMap;

type Tensors = Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>;

/// Three tensors of three types; `shift` moves every value of the large one.
fn tensors(shift: f32) -> Tensors {
    let large: Vec<u8> = (0..6000)
        .flat_map(|i| (i as f32 * 0.5 + shift).to_le_bytes())
        .collect();
    let half: Vec<u8> = (0..8)
        .flat_map(|i| half::bf16::from_f32(i as f32 - 3.5).to_le_bytes())
        .collect();
    vec![
        (
            "model.embed_tokens.weight",
            Dtype::F32,
            vec![60, 100],
            large,
        ),
        ("model.norm.weight", Dtype::BF16, vec![8], half),
        ("scales", Dtype::F8_E4M3, vec![3], vec![1, 2, 3]),
    ]
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (
            *name,
            Raw::new(*dtype, shape.clone(), data).expect("a tensor"),
        )
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path).expect("written");
}

fn single(tensors: &Tensors) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    write(&folder.path().join(SINGLE), tensors);
    folder
}

/// Each tensor in a file of its own, and an index.
fn sharded(tensors: &Tensors) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let mut map = serde_json::Map::new();
    for (number, tensor) in tensors.iter().enumerate() {
        let file = format!(
            "model-{:05}-of-{:05}.safetensors",
            number + 1,
            tensors.len()
        );
        write(&folder.path().join(&file), &vec![tensor.clone()]);
        map.insert(tensor.0.to_owned(), file.into());
    }
    write_index(
        folder.path(),
        &json!({"metadata": {"total_size": 1}, "weight_map": map}),
    );
    folder
}

fn write_index(folder: &Path, index: &serde_json::Value) {
    std::fs::write(folder.join(INDEX), index.to_string()).expect("written");
}

fn open(folder: &tempfile::TempDir) -> Checkpoint {
    Checkpoint::open(folder.path()).expect("a checkpoint")
}

fn refused(folder: &tempfile::TempDir) -> (String, String) {
    let error = Checkpoint::open(folder.path()).expect_err("must be refused");
    (
        error.to_string(),
        error.hint_text().unwrap_or_default().to_owned(),
    )
}

#[test]
fn reads_one_file_and_shards_alike() {
    for folder in [single(&tensors(0.0)), sharded(&tensors(0.0))] {
        let checkpoint = open(&folder);
        assert_eq!(
            checkpoint.names().collect::<Vec<_>>(),
            ["model.embed_tokens.weight", "model.norm.weight", "scales"]
        );
        assert!(checkpoint.contains("scales") && !checkpoint.contains("lm_head.weight"));
        assert_eq!(checkpoint.metadata()["format"], "pt");
        let norm = checkpoint.get("model.norm.weight").expect("the norm");
        assert_eq!((norm.dtype, norm.shape.as_slice()), (DType::BF16, &[8][..]));
        let values = norm
            .to_f32_tensor()
            .and_then(|tensor| Ok(tensor.to_vec1::<f32>()?))
            .expect("values");
        assert_eq!(values, [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]);
        let embedding = checkpoint
            .get("model.embed_tokens.weight")
            .expect("the embedding");
        let tensor = embedding.to_tensor().expect("a tensor");
        assert_eq!(
            (tensor.dims(), tensor.dtype()),
            (&[60, 100][..], DType::F32)
        );
        assert_eq!(tensor.to_vec2::<f32>().expect("rows")[59][99], 2999.5);
        assert_eq!(
            checkpoint.stored("scales").expect("the bytes").data(),
            [1, 2, 3]
        );
    }
    let files: Vec<_> = open(&sharded(&tensors(0.0)))
        .shards()
        .map(|(file, names)| (file.to_owned(), names.len()))
        .collect();
    assert_eq!(files.len(), 3);
    assert_eq!(files[0], ("model-00001-of-00003.safetensors".to_owned(), 1));
}

#[test]
fn a_view_outlives_its_checkpoint() {
    let folder = single(&tensors(0.0));
    let view = open(&folder).get("model.norm.weight").expect("the norm");
    drop(folder);
    assert_eq!(view.data().len(), 16);
}

#[test]
fn unknown_names_and_types_are_errors() {
    let folder = single(&tensors(0.0));
    let checkpoint = open(&folder);
    let absent = checkpoint.get("norm.weight").expect_err("absent");
    assert!(absent.to_string().contains("`norm.weight`"));
    assert!(
        absent
            .hint_text()
            .expect("a hint")
            .contains("`model.norm.weight`")
    );
    let eight = checkpoint
        .get("scales")
        .expect_err("not implemented")
        .to_string();
    assert!(
        eight.contains("`scales`") && eight.contains("F8_E4M3"),
        "{eight}"
    );
}

#[test]
fn the_fingerprint_is_of_the_weights_only() {
    let of = |folder: &tempfile::TempDir| open(folder).fingerprint().expect("a fingerprint");
    let one = of(&single(&tensors(0.0)));
    assert_eq!(one.len(), 64);
    assert_eq!(one, of(&sharded(&tensors(0.0))));
    assert_ne!(one, of(&single(&tensors(0.001))));

    let mut wider = tensors(0.0);
    wider[1].1 = Dtype::F32;
    wider[1].3 = (0..8)
        .flat_map(|i| (i as f32 - 3.5).to_le_bytes())
        .collect();
    assert_eq!(one, of(&single(&wider)));
    let mut reshaped = tensors(0.0);
    reshaped[0].2 = vec![100, 60];
    assert_ne!(one, of(&single(&reshaped)));
    let mut last = tensors(0.0);
    if let Some(byte) = last[0].3.last_mut() {
        *byte ^= 0x40;
    }
    assert_ne!(one, of(&single(&last)), "the last value is in the sample");
}

#[test]
fn values_that_are_no_numbers_are_seen_with_the_digest() {
    // The last of each: those before it are as large as can be.
    let cases: [(Dtype, &[u8], &[u8]); 6] = [
        (Dtype::F32, &[0xff, 0xff, 0x7f, 0xff], &[0, 0, 0x80, 0xff]),
        (Dtype::F32, &[0xff, 0xff, 0x7f, 0x7f], &[1, 0, 0xc0, 0x7f]),
        (Dtype::BF16, &[0x7f, 0x7f], &[0x80, 0x7f]),
        (Dtype::F16, &[0xff, 0x7b], &[0, 0xfc]),
        (
            Dtype::F64,
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xef, 0x7f],
            &[0, 0, 0, 0, 0, 0, 0xf0, 0x7f],
        ),
        (Dtype::U8, &[0xff], &[0xff]),
    ];
    for (dtype, largest, odd) in cases {
        assert!(all_finite(&largest.repeat(9), dtype), "{dtype}");
        let one = [largest.repeat(8), odd.to_vec()].concat();
        assert_eq!(all_finite(&one, dtype), dtype == Dtype::U8, "{dtype}");
    }
}

#[test]
fn the_digest_is_of_every_byte() {
    let of = |folder: &tempfile::TempDir| open(folder).digest().sha256;
    let one = of(&single(&tensors(0.0)));
    assert_eq!(one.len(), 64);
    assert_eq!(one, of(&sharded(&tensors(0.0))));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let alone = pool.expect("a pool").install(|| of(&single(&tensors(0.0))));
    assert_eq!(one, alone);

    // The lowest bit of a value between two runs of the fingerprint's sample.
    let mut unsampled = tensors(0.0);
    unsampled[0].3[4 * 150] ^= 1;
    let changed = single(&unsampled);
    let fingerprint =
        |folder: &tempfile::TempDir| open(folder).fingerprint().expect("a fingerprint");
    assert_eq!(
        fingerprint(&changed),
        fingerprint(&single(&tensors(0.0))),
        "it was to be a value that is not in the sample"
    );
    assert_ne!(one, of(&changed));

    let mut reshaped = tensors(0.0);
    reshaped[0].2 = vec![100, 60];
    assert_ne!(one, of(&single(&reshaped)));
    let mut retyped = tensors(0.0);
    retyped[1].1 = Dtype::F16;
    assert_ne!(one, of(&single(&retyped)));
    let mut renamed = tensors(0.0);
    renamed[1].0 = "model.norm.bias";
    assert_ne!(one, of(&single(&renamed)));
}

#[test]
fn damaged_files_are_refused_with_their_sizes() {
    let folder = single(&tensors(0.0));
    let path = folder.path().join(SINGLE);
    let whole = std::fs::read(&path).expect("the file");
    for length in [0, 7, 8, 100, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).expect("written");
        let (text, hint) = refused(&folder);
        assert!(
            text.contains(SINGLE) && hint.contains("download it again"),
            "{length}: {text} / {hint}"
        );
    }
    assert!(refused(&folder).0.contains(&(24_000 + 16 + 2).to_string()));
    std::fs::write(&path, [whole.as_slice(), b"more"].concat()).expect("written");
    assert!(
        refused(&folder)
            .0
            .contains(&(24_000 + 16 + 3 + 4).to_string())
    );
    std::fs::write(
        &path,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    )
    .expect("written");
    assert!(refused(&folder).1.contains("git lfs pull"));
    std::fs::write(&path, "<!DOCTYPE html><html>not weights</html>").expect("written");
    assert!(refused(&folder).0.contains("not a safetensors file"));
}

#[test]
fn lying_headers_are_refused() {
    let file = |header: serde_json::Value, data: usize| {
        let header = header.to_string();
        [
            &(header.len() as u64).to_le_bytes()[..],
            header.as_bytes(),
            &vec![0; data],
        ]
        .concat()
    };
    let tensor = |shape: &[u64], from: u64, to: u64| json!({"dtype": "F32", "shape": shape, "data_offsets": [from, to]});
    assert!(read_header(&file(json!({"a": tensor(&[2], 0, 8)}), 8), 0).is_ok());
    for (header, data) in [
        (
            json!({"a": tensor(&[2], 0, 8), "b": tensor(&[2], 4, 12)}),
            12,
        ),
        (
            json!({"a": tensor(&[2], 0, 8), "b": tensor(&[2], 12, 20)}),
            20,
        ),
        (json!({"a": tensor(&[3], 0, 8)}), 8),
        (json!({"a": tensor(&[2], 8, 0)}), 8),
        (json!({"a": tensor(&[u64::MAX, 2], 0, 8)}), 8),
        (json!({"a": tensor(&[2], u64::MAX - 7, u64::MAX)}), 8),
        (
            json!({"a": {"dtype": "I4", "shape": [2], "data_offsets": [0, 1]}}),
            1,
        ),
        (json!([1]), 0),
    ] {
        assert!(
            read_header(&file(header.clone(), data), 0).is_err(),
            "{header}"
        );
    }
    // Seven tensors of 2^61 bytes and one more reach the end of the address space, where a sum of lengths wraps.
    let step = 1u64 << 61;
    let mut huge: serde_json::Map<String, serde_json::Value> = (0..7)
        .map(|i| {
            (
                format!("t{i}"),
                tensor(&[step / 4], i * step, (i + 1) * step),
            )
        })
        .collect();
    huge.insert(
        "t7".to_owned(),
        tensor(&[step / 4 - 4], 7 * step, 7 * step + (step - 16)),
    );
    assert!(read_header(&file(huge.into(), 8), 0).is_err());
}

#[test]
fn an_index_may_only_name_files_beside_it() {
    let folder = tempfile::tempdir().expect("a folder");
    for file in [
        "../a.safetensors",
        "/etc/a.safetensors",
        "sub/a.safetensors",
        "..",
        "",
        "C:a.safetensors",
        "a\\b.safetensors",
        "a.bin",
        "./a.safetensors",
    ] {
        write_index(folder.path(), &json!({"weight_map": {"a": file}}));
        assert!(refused(&folder).0.contains("plain names"), "{file}");
    }
    write_index(folder.path(), &json!({"weight_map": {}}));
    assert!(refused(&folder).0.contains("empty"));
    write_index(folder.path(), &json!({"weights": 1}));
    assert!(refused(&folder).0.contains("weight_map"));
}

#[test]
fn index_and_files_must_agree() {
    let folder = sharded(&tensors(0.0));
    std::fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).expect("removed");
    let (text, _) = refused(&folder);
    assert!(
        text.contains("1 of the 3 files") && text.contains("`model-00002-of-00003.safetensors`"),
        "{text}"
    );

    let folder = single(&tensors(0.0));
    std::fs::rename(
        folder.path().join(SINGLE),
        folder.path().join("all.safetensors"),
    )
    .expect("renamed");
    write_index(
        folder.path(),
        &json!({"weight_map": {"scales": "all.safetensors", "gone": "all.safetensors"}}),
    );
    assert!(refused(&folder).0.contains("`gone`"));

    // The same tensor in two files: the index decides, and without its word it is an error.
    write(
        &folder.path().join("other.safetensors"),
        &vec![
            ("scales", Dtype::U8, vec![1], vec![9]),
            ("x", Dtype::U8, vec![1], vec![9]),
        ],
    );
    write_index(
        folder.path(),
        &json!({"weight_map": {"scales": "all.safetensors", "x": "other.safetensors"}}),
    );
    assert_eq!(
        open(&folder).stored("scales").expect("bytes").data(),
        [1, 2, 3]
    );
    write_index(
        folder.path(),
        &json!({"weight_map": {"x": "other.safetensors", "model.norm.weight": "all.safetensors"}}),
    );
    assert!(refused(&folder).0.contains("`scales`"));
}

#[test]
fn folders_without_safetensors_say_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(refused(&folder).0.contains(SINGLE));
    std::fs::write(folder.path().join("consolidated.safetensors"), "").expect("written");
    assert!(refused(&folder).1.contains("`consolidated.safetensors`"));
    std::fs::write(folder.path().join("adapter_config.json"), "{}").expect("written");
    assert!(refused(&folder).0.contains("an adapter"));
    std::fs::write(folder.path().join("pytorch_model.bin"), "").expect("written");
    let (text, hint) = refused(&folder);
    assert!(
        text.contains("pickle")
            && text.contains("`pytorch_model.bin`")
            && hint.contains("save_pretrained")
    );
    let file = folder.path().join("pytorch_model.bin");
    assert!(
        Checkpoint::open(&file)
            .expect_err("a file")
            .to_string()
            .contains("found a file")
    );
    assert!(Checkpoint::open(&file.join("none")).is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_header(&bytes, 0);
    }

    #[test]
    fn any_header_is_read_or_refused(
        header in r#"\{("[ab]":\{"dtype":"(F32|BF16|F4|BOOL|X)","shape":\[[0-9]{0,3}(,[0-9]{1,20})?\],"data_offsets":\[[0-9]{1,2},[0-9]{1,20}\]\},?){0,3}\}"#,
        data in 0usize..40,
    ) {
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
        if let Ok((tensors, _)) = read_header(&file, 0) {
            prop_assert!(tensors.iter().all(|(_, stored)| file.get(stored.bytes.clone()).is_some()));
        }
    }

    #[test]
    fn a_damaged_file_never_reads_outside(at in 0usize..400, byte in any::<u8>()) {
        let folder = single(&tensors(0.0));
        let path = folder.path().join(SINGLE);
        let mut bytes = std::fs::read(&path).expect("the file");
        if let Some(old) = bytes.get_mut(at) {
            *old = byte;
        }
        if let Ok((tensors, _)) = read_header(&bytes, 0) {
            prop_assert!(tensors.iter().all(|(_, stored)| bytes.get(stored.bytes.clone()).is_some()));
        }
    }

    #[test]
    fn any_index_is_read_or_refused(text in r#"\{"weight_map":\{("[a-z]":("[./a-z\\]{0,20}(\.safetensors)?"|1|null),?){0,3}\}\}|.{0,60}"#) {
        if let Ok(map) = read_index(&text) {
            let folder = Path::new("/checkpoint");
            prop_assert!(map.values().all(|file| folder.join(file).parent() == Some(folder)));
        }
    }
}
