//! Checkpoints saved and read back, whole, damaged, of other runs and versions; which are kept.

use super::state::VERSION;
use super::*;
use crate::adapters::storage::Init;
use crate::digest::hexadecimal;
use candle_core::{DType, Device};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const FILES: [&str; 5] = [SUMS, BEST, OPTIMIZER, STATE, WEIGHTS];

/// Saves a checkpoint of `step` with every value of every tensor equal to `value`.
fn write(
    checkpoints: &Checkpoints,
    (step, value): (usize, f32),
    keep: usize,
    damaged: &[Damaged],
) -> Result<()> {
    let tensor = Tensor::from_vec(vec![value; 6], (2, 3), &Device::Cpu)?;
    let mut weights = AdapterWeights::fresh(0, &Device::Cpu);
    weights.var("a", (2, 3), Init::Values(&tensor))?;
    let mut optimizer = AdamW::new(&weights)?;
    let moments = BTreeMap::from([
        ("first.a".to_owned(), tensor.clone()),
        ("second.a".to_owned(), tensor.clone()),
    ]);
    optimizer.restore(&moments, step as u64)?;
    let best = BTreeMap::from([("a".to_owned(), tensor)]);
    let state = TrainState {
        step,
        ..TrainState::default()
    };
    checkpoints.save(&state, &weights, &optimizer, &best, keep, damaged)
}

fn save(checkpoints: &Checkpoints, steps: &[usize]) -> Result<()> {
    steps
        .iter()
        .try_for_each(|step| write(checkpoints, (*step, *step as f32), 9, &[]))
}

/// A run's checkpoints of steps 20 and 40, and the folder of the newer one.
fn two(run: &TempDir) -> Result<(Checkpoints, PathBuf)> {
    let checkpoints = Checkpoints::of_run(run.path());
    save(&checkpoints, &[20, 40])?;
    let newest = checkpoints.newest_folder()?.expect("saved");
    Ok((checkpoints, newest))
}

fn run() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

fn sum(path: &Path) -> String {
    let bytes = fs::read(path).expect("a file");
    hexadecimal(&Sha256::digest(&bytes))
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).expect("a file");
    change(&mut bytes);
    fs::write(path, bytes).expect("written");
}

/// Changes the state of a checkpoint, and its checksum with it.
fn forge(folder: &Path, from: &str, to: &str) {
    let (state, sums) = (folder.join(STATE), folder.join(SUMS));
    let exchange = |file: &Path, from: &str, to: &str| {
        let text = fs::read_to_string(file).expect("a text");
        assert!(text.contains(from), "no {from} in {text}");
        fs::write(file, text.replacen(from, to, 1)).expect("written");
    };
    let before = sum(&state);
    exchange(&state, from, to);
    exchange(&sums, &before, &sum(&state));
}

/// Asserts that the newest checkpoint is passed over for that of step 20, and why.
fn passed_over(checkpoints: &Checkpoints, newest: &Path, reason: &str) -> Result<()> {
    let saved = checkpoints.latest()?;
    assert_eq!(saved.state.step, 20, "{reason}");
    assert_eq!(saved.damaged.len(), 1, "{reason}");
    assert_eq!(saved.damaged[0].folder, newest);
    let said = saved.damaged[0].to_string();
    assert!(said.contains("step-000040 is damaged"), "{said}");
    assert!(said.contains(reason), "no `{reason}` in {said}");
    assert_eq!(checkpoints.newest_intact()?, Some(saved.folder));
    Ok(())
}

#[test]
fn a_checkpoint_comes_back_as_it_was_saved() -> Result<()> {
    let run = run();
    let (checkpoints, newest) = two(&run)?;
    let saved = checkpoints.latest()?;
    assert_eq!((saved.state.step, &saved.folder), (40, &newest));
    for (tensors, name) in [
        (&saved.weights, "a"),
        (&saved.optimizer, "first.a"),
        (&saved.optimizer, "second.a"),
        (&saved.best, "a"),
    ] {
        assert_eq!(tensors[name].to_vec2::<f32>()?, [[40.0; 3]; 2], "{name}");
    }
    assert!(saved.damaged.is_empty());
    assert_eq!(names(&newest), FILES);
    Ok(())
}

#[test]
fn the_checksums_are_those_of_sha256sum() -> Result<()> {
    let run = run();
    let (_, newest) = two(&run)?;
    let sums = fs::read_to_string(newest.join(SUMS)).expect("the checksums");
    let mut lines = Vec::new();
    for name in [WEIGHTS, OPTIMIZER, BEST, STATE] {
        lines.push(format!("{}  {name}\n", sum(&newest.join(name))));
    }
    assert_eq!(sums, lines.concat());
    Ok(())
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_is_used() -> Result<()> {
    type Damage = fn(&mut Vec<u8>);
    let cut: Damage = |bytes| bytes.truncate(20);
    let longer: Damage = |bytes| bytes.push(0);
    let flipped: Damage = |bytes| {
        if let Some(last) = bytes.last_mut() {
            *last ^= 0x80;
        }
    };
    let emptied: Damage = Vec::clear;
    let garbage: Damage = |bytes| *bytes = b"{ \"version\": 2".to_vec();
    let other_sum = "its checksum is not the one in `SHA256SUMS`";
    for (name, damage, reason) in [
        (WEIGHTS, cut, "has 20 bytes, and "),
        (OPTIMIZER, longer, " were written"),
        (BEST, emptied, "has 0 bytes, and "),
        (WEIGHTS, flipped, other_sum),
        (OPTIMIZER, flipped, other_sum),
        (BEST, flipped, other_sum),
        (STATE, cut, other_sum),
        (STATE, garbage, other_sum),
        (SUMS, cut, "has no checksum in `SHA256SUMS`"),
        (SUMS, emptied, "has no checksum in `SHA256SUMS`"),
    ] {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        change(&newest.join(name), damage);
        passed_over(&checkpoints, &newest, reason)?;
    }
    for name in FILES {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        fs::remove_file(newest.join(name)).expect("removed");
        let reason = format!("({name}: no such file or folder)");
        passed_over(&checkpoints, &newest, &reason)?;
    }
    // Without checksums it is the text alone that tells.
    let run = run();
    let (checkpoints, newest) = two(&run)?;
    fs::remove_file(newest.join(SUMS)).expect("removed");
    change(&newest.join(STATE), garbage);
    passed_over(&checkpoints, &newest, "(state.json: not valid JSON")
}

#[test]
fn no_flipped_bit_of_state_or_checksums_goes_unseen() -> Result<()> {
    let run = run();
    let (checkpoints, newest) = two(&run)?;
    for name in [STATE, SUMS] {
        let path = newest.join(name);
        let whole = fs::read(&path).expect("a file");
        for place in 0..whole.len() {
            change(&path, |bytes| bytes[place] ^= 1);
            // Not even a version that became another one keeps the one before from being used.
            passed_over(&checkpoints, &newest, "SHA256SUMS")?;
            fs::write(&path, &whole).expect("written");
        }
    }
    assert!(checkpoints.latest()?.damaged.is_empty());
    Ok(())
}

#[test]
fn a_state_of_another_step_than_its_folder_is_damage() -> Result<()> {
    for step in ["4000", "9223372036854775808", "39"] {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        forge(&newest, "\"step\": 40,", &format!("\"step\": {step},"));
        let reason = format!("(state.json: is of step {step}, unlike its folder)");
        passed_over(&checkpoints, &newest, &reason)?;
    }
    Ok(())
}

#[test]
fn a_stray_file_among_the_checkpoints_is_named_and_goes_with_the_next() -> Result<()> {
    let run = run();
    let (checkpoints, newest) = two(&run)?;
    let stray = newest.with_file_name("step-000100");
    fs::write(&stray, "notes").expect("written");
    let saved = checkpoints.latest()?;
    assert_eq!((saved.state.step, &saved.folder), (40, &newest));
    let said = saved.damaged[0].to_string();
    let reason = "step-000100 is damaged (a file, and a folder is needed)";
    assert!(said.contains(reason), "{said}");
    write(&checkpoints, (60, 60.0), 9, &saved.damaged)?;
    assert_eq!(
        names(&run.path().join("checkpoints")),
        ["step-000020", "step-000040", "step-000060"]
    );
    // In the place of one that is saved.
    let stray = newest.with_file_name("step-000080");
    fs::write(&stray, "notes").expect("written");
    save(&checkpoints, &[80])?;
    assert_eq!(checkpoints.latest()?.folder, stray);
    fs::write(newest.with_file_name("step-000100"), "notes").expect("written");
    checkpoints.remove()?;
    assert!(names(run.path()).is_empty());

    fs::write(run.path().join("checkpoints"), "notes").expect("written");
    let error = checkpoints.latest().expect_err("a file");
    let said = error.to_string();
    assert!(
        said.ends_with("checkpoints: a file, and a folder is needed"),
        "{said}"
    );
    assert!(error.hint_text().is_some());
    assert!(save(&checkpoints, &[20]).is_err() && checkpoints.remove().is_err());
    Ok(())
}

#[cfg(unix)]
#[test]
fn through_a_link_nothing_is_read_written_or_removed() -> Result<()> {
    let (run, other) = (run(), run());
    let (checkpoints, newest) = two(&run)?;
    let (_, others) = two(&other)?;
    let others = others.parent().expect("a folder").to_owned();
    fs::create_dir(others.join(".writing-1a2b3c")).expect("a folder");
    let before = names(&others);
    let refused = || {
        for result in [
            checkpoints.latest().map(drop),
            checkpoints.newest_folder().map(drop),
            checkpoints.newest_intact().map(drop),
            checkpoints.remove(),
            write(&checkpoints, (60, 60.0), 1, &[]),
        ] {
            let error = result.expect_err("a link");
            assert!(error.to_string().contains("a link, which"), "{error}");
            assert!(error.hint_text().is_some());
        }
        assert_eq!(names(&others), before);
    };
    let own = run.path().join("checkpoints");
    let link = newest.with_file_name("step-000030");
    std::os::unix::fs::symlink(others.join("step-000040"), &link).expect("a link");
    refused();
    assert_eq!(names(&others.join("step-000040")), FILES);
    fs::remove_dir_all(&own).expect("removed");
    for target in [others.as_path(), Path::new("nowhere")] {
        std::os::unix::fs::symlink(target, &own).expect("a link");
        refused();
        fs::remove_file(&own).expect("removed");
    }
    assert!(names(run.path()).is_empty());
    Ok(())
}

/// A device without end says of itself that it has no bytes.
#[cfg(unix)]
#[test]
fn a_device_in_the_place_of_a_file_is_damage_and_is_not_read() -> Result<()> {
    let place_device = |folder: &Path, name: &str| {
        let path = folder.join(name);
        fs::remove_file(&path).expect("removed");
        std::os::unix::fs::symlink("/dev/zero", &path).expect("a link");
        path
    };
    for name in FILES {
        let run = run();
        let (checkpoints, newest) = two(&run)?;
        let path = newest.join(name);
        if [BEST, OPTIMIZER, WEIGHTS].contains(&name) {
            let length = fs::metadata(&path).expect("a file").len();
            let said = format!("\"{name}\": ");
            forge(&newest, &format!("{said}{length}"), &format!("{said}0"));
            let sums = fs::read_to_string(newest.join(SUMS)).expect("the checksums");
            let nothing = hexadecimal(&Sha256::digest(b""));
            let line = |sum: &str| format!("{sum}  {name}");
            let sums = sums.replace(&line(&sum(&path)), &line(&nothing));
            fs::write(newest.join(SUMS), sums).expect("written");
        }
        let path = place_device(&newest, name);
        // The checksums are read as other small files are.
        let reason = match name {
            SUMS => "SHA256SUMS: a pipe or a device".to_owned(),
            _ => format!("{}: a link, which", path.display()),
        };
        passed_over(&checkpoints, &newest, &reason)?;
    }
    Ok(())
}

#[test]
fn when_all_are_damaged_the_error_names_each() -> Result<()> {
    let run = run();
    let (checkpoints, newest) = two(&run)?;
    change(&newest.join(WEIGHTS), |bytes| bytes.truncate(20));
    let older = newest.with_file_name("step-000020");
    fs::remove_file(older.join(STATE)).expect("removed");
    let error = checkpoints.latest().expect_err("all are damaged");
    let said = error.to_string();
    for part in [
        "no checkpoint is intact",
        &format!(
            "{} is damaged (weights.safetensors: has 20 bytes",
            newest.display()
        ),
        &format!("{} is damaged (state.json: no such file", older.display()),
    ] {
        assert!(said.contains(part), "no `{part}` in {said}");
    }
    assert!(error.hint_text().is_some());
    assert_eq!(checkpoints.newest_intact()?, None);
    assert_eq!(names(&run.path().join("checkpoints")).len(), 2);

    let none = Checkpoints::of_run(&run.path().join("other"));
    let error = none.latest().expect_err("there is none");
    assert!(error.to_string().ends_with("no checkpoint to resume from"));
    Ok(())
}

#[test]
fn another_version_is_refused_although_an_older_one_would_do() -> Result<()> {
    let run = run();
    let (checkpoints, newest) = two(&run)?;
    let set_version = |from: u32, to: u32| {
        let path = newest.join(STATE);
        let text = fs::read_to_string(&path).expect("the state");
        let said = |version: u32| format!("\"version\": {version}");
        assert!(text.contains(&said(from)), "{text}");
        fs::write(&path, text.replace(&said(from), &said(to))).expect("written");
    };
    let refused = |version: u32| {
        let error = checkpoints.latest().expect_err("another version");
        let fact = format!("state.json: layout version {version} is not known here");
        assert!(error.to_string().ends_with(&fact), "{error}");
        assert!(error.hint_text().is_some());
    };
    let path = newest.join(STATE);
    let before = sum(&path);
    set_version(VERSION, 3);
    let after = sum(&path);
    let sums = fs::read_to_string(newest.join(SUMS)).expect("the checksums");
    fs::write(newest.join(SUMS), sums.replace(&before, &after)).expect("written");
    refused(3);
    // The first version had no checksums.
    fs::remove_file(newest.join(SUMS)).expect("removed");
    set_version(3, 1);
    refused(1);
    Ok(())
}

#[test]
fn a_run_on_other_inputs_is_refused_although_an_older_one_would_do() -> Result<()> {
    let run = run();
    let on = |data: &str| {
        Checkpoints::of_run(run.path()).on(Inputs {
            base: "base".to_owned(),
            weights: None,
            training: None,
            method: "method".to_owned(),
            start: None,
            data: data.to_owned(),
            held_out: None,
            order: None,
            device: "cpu".to_owned(),
            compute_type: "f32".to_owned(),
            quantization: None,
            machine: None,
        })
    };
    on("mine").refuse_other_beginning()?;
    on("mine").begin()?;
    on("mine").refuse_other_beginning()?;
    let error = on("other")
        .refuse_other_beginning()
        .expect_err("other data");
    assert!(
        error
            .to_string()
            .ends_with("inputs.json: the training data has changed since the run was interrupted"),
        "{error}"
    );
    save(&on("mine"), &[20])?;
    save(&on("other"), &[40])?;
    let error = on("mine").latest().expect_err("other data");
    assert!(
        error.to_string().contains("the training data has changed"),
        "{error}"
    );
    Ok(())
}

#[test]
fn the_newest_are_kept_and_the_one_just_saved_always() -> Result<()> {
    let run = run();
    let (checkpoints, _) = two(&run)?;
    let folder = run.path().join("checkpoints");
    write(&checkpoints, (60, 60.0), 2, &[])?;
    assert_eq!(names(&folder), ["step-000040", "step-000060"]);
    write(&checkpoints, (80, 80.0), 0, &[])?;
    assert_eq!(names(&folder), ["step-000080"]);
    Ok(())
}

#[test]
fn damaged_checkpoints_do_not_count_among_those_kept() -> Result<()> {
    let run = run();
    let (checkpoints, newest) = two(&run)?;
    let folder = run.path().join("checkpoints");
    fs::remove_file(newest.join(BEST)).expect("removed");
    // Gone on from step 20, and saved before what is damaged: nothing older is lost to it.
    write(&checkpoints, (30, 30.0), 2, &checkpoints.latest()?.damaged)?;
    assert_eq!(names(&folder), ["step-000020", "step-000030"]);

    // Saved after what is damaged.
    save(&checkpoints, &[35])?;
    fs::remove_file(folder.join("step-000035").join(BEST)).expect("removed");
    write(&checkpoints, (40, 40.0), 3, &checkpoints.latest()?.damaged)?;
    assert_eq!(
        names(&folder),
        ["step-000020", "step-000030", "step-000040"]
    );

    // Saved in place of what is damaged: from then on it is as good as any.
    fs::remove_file(newest.join(BEST)).expect("removed");
    let damaged = checkpoints.latest()?.damaged;
    write(&checkpoints, (40, 41.0), 3, &damaged)?;
    assert_eq!(checkpoints.latest()?.state.step, 40);
    write(&checkpoints, (50, 50.0), 3, &damaged)?;
    assert_eq!(
        names(&folder),
        ["step-000030", "step-000040", "step-000050"]
    );
    Ok(())
}

#[test]
fn a_step_saved_again_takes_the_place_of_the_first() -> Result<()> {
    let run = run();
    let (checkpoints, newest) = two(&run)?;
    write(&checkpoints, (40, 0.5), 2, &[])?;
    let saved = checkpoints.latest()?;
    assert_eq!(saved.folder, newest);
    assert_eq!(saved.weights["a"].to_vec2::<f32>()?, [[0.5; 3]; 2]);
    assert_eq!(names(&newest), FILES);
    assert_eq!(
        names(&run.path().join("checkpoints")),
        ["step-000020", "step-000040"]
    );
    Ok(())
}

#[test]
fn removed_checkpoints_leave_a_run_without_any() -> Result<()> {
    let run = run();
    let (checkpoints, _) = two(&run)?;
    assert_eq!(checkpoints.run(), Some(run.path()));
    checkpoints.remove()?;
    assert_eq!(checkpoints.newest_folder()?, None);
    assert!(names(run.path()).is_empty());
    checkpoints.remove()?;
    assert_eq!(Checkpoints::of_run(&run.path().join("other")).run(), None);
    Ok(())
}

#[test]
fn a_tensor_of_another_run_is_named_with_what_is_wrong() -> Result<()> {
    let run = run();
    let (checkpoints, _) = two(&run)?;
    let saved = checkpoints.latest()?;
    let tensor = |dims: (usize, usize)| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    assert_eq!(saved.weight("a", &tensor((2, 3))?)?.dims(), [2, 3]);
    for (name, dims, fact) in [
        ("a", (3, 2), "`a` is [2, 3], the run has [3, 2]"),
        ("b", (2, 3), "there is no `b` in it"),
    ] {
        let error = saved.weight(name, &tensor(dims)?).expect_err(fact);
        assert!(error.to_string().ends_with(fact), "{error}");
    }
    Ok(())
}

#[test]
fn what_a_killed_process_left_is_no_checkpoint_and_goes_with_the_next() -> Result<()> {
    let run = run();
    let (checkpoints, newest) = two(&run)?;
    let left = newest.with_file_name(".writing-1a2b3c");
    fs::create_dir(&left).expect("a folder");
    fs::write(left.join(WEIGHTS), b"half").expect("a file");
    assert_eq!(checkpoints.latest()?.state.step, 40);
    assert!(checkpoints.latest()?.damaged.is_empty());
    save(&checkpoints, &[60])?;
    assert_eq!(
        names(&run.path().join("checkpoints")),
        ["step-000020", "step-000040", "step-000060"]
    );
    Ok(())
}
