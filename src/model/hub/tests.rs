//! What needs no server: names, and options from variables. Downloads are tested in `tests/hub.rs`.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::time::Duration;

fn options(variables: &[(&str, &str)]) -> Result<HubOptions> {
    let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
    HubOptions::from_variables(|name| variables.get(name).map(|value| (*value).to_owned()))
}

#[test]
fn ids_have_an_organisation_a_name_and_a_revision() {
    let id = HubId::parse("Qwen/Qwen2.5-0.5B").expect("an id");
    assert_eq!(
        (id.repository(), id.revision()),
        ("Qwen/Qwen2.5-0.5B", "main")
    );
    assert_eq!(id.to_string(), "Qwen/Qwen2.5-0.5B");
    let pinned = HubId::parse("org/name@refs/pr/1").expect("an id");
    assert_eq!(
        (pinned.revision(), pinned.to_string().as_str()),
        ("refs/pr/1", "org/name@refs/pr/1")
    );
    for text in [
        "",
        "gpt2",
        "/",
        "a/",
        "/b",
        "a/b/c",
        "../b",
        "a/..",
        "./b",
        "a/b@",
        "a/b@../c",
        "a/b@/c",
        "a/b@c//d",
        "a/b@.c",
        "a/b@c@d",
        "a b/c",
        "a/b--c",
        "a/.b",
        "C:\\models/x",
        "a/b@c\\d",
        "ä/b",
        "a/b?c",
        "a/b#c",
    ] {
        assert_eq!(HubId::parse(text), None, "{text}");
    }
}

#[test]
fn a_folder_that_exists_wins() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = folder.path().display().to_string();
    assert_eq!(
        ModelSource::parse(&text).expect("a folder"),
        ModelSource::Folder(folder.path().to_owned())
    );
    let id = HubId::parse("org/name@v1").expect("an id");
    assert_eq!(
        ModelSource::parse("org/name@v1").expect("an id"),
        ModelSource::Hub(id)
    );
    let neither = ModelSource::parse("./no/such/folder").expect_err("neither");
    assert!(
        neither
            .to_string()
            .contains("neither an existing folder nor a hub id"),
        "{neither}"
    );
    let address = ModelSource::parse("https://huggingface.co/org/name").expect_err("an address");
    assert!(address.hint_text().expect("a hint").contains("`org/name`"));
    let secret = ModelSource::parse("https://user:secret@huggingface.co/org/name");
    let error = secret.expect_err("an address");
    assert!(!error.to_string().contains("secret"), "{error}");
    assert!(error.hint_text().expect("a hint").contains("`org/name`"));
    let file = folder.path().join("model.safetensors");
    std::fs::write(&file, "").expect("written");
    assert!(
        ModelSource::parse(&file.display().to_string())
            .expect_err("a file")
            .to_string()
            .contains("found a file")
    );
}

#[test]
fn the_cache_is_where_huggingface_hub_has_it() {
    let cache = |variables: &[(&str, &str)]| options(variables).expect("options").cache;
    assert_eq!(
        cache(&[("HOME", "/home/a")]),
        Path::new("/home/a/.cache/huggingface/hub")
    );
    assert_eq!(
        cache(&[("HOME", "/home/a"), ("XDG_CACHE_HOME", "/x")]),
        Path::new("/x/huggingface/hub")
    );
    assert_eq!(
        cache(&[("HOME", "/home/a"), ("HF_HOME", "~/hf")]),
        Path::new("/home/a/hf/hub")
    );
    assert_eq!(
        cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]),
        Path::new("/c")
    );
    assert!(options(&[("HF_HOME", "  ")]).is_err());
}

#[test]
fn variables_become_options() {
    let plain = options(&[("HOME", "/nowhere")]).expect("options");
    assert_eq!(plain, HubOptions::new("/nowhere/.cache/huggingface/hub"));
    let set = options(&[
        ("HF_HOME", "/nowhere"),
        ("HF_ENDPOINT", "https://mirror.example/hf/"),
        ("HF_TOKEN", " hf_abc \n"),
        ("HF_HUB_OFFLINE", "true"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "7"),
        ("https_proxy", "http://proxy:3128"),
        ("NO_PROXY", "localhost, .example"),
    ])
    .expect("options");
    assert_eq!(set.endpoint, "https://mirror.example/hf");
    assert_eq!(set.token, Some(Token::new("hf_abc").expect("a token")));
    assert_eq!(
        (set.access, set.timeout),
        (Access::Offline, Duration::from_secs(7))
    );
    assert_eq!(set.proxy.as_deref(), Some("http://proxy:3128"));
    assert_eq!(set.proxy_exceptions, ["localhost", ".example"]);
    let off = options(&[
        ("HF_HOME", "/nowhere"),
        ("HF_HUB_OFFLINE", "0"),
        ("TRANSFORMERS_OFFLINE", "1"),
    ]);
    assert_eq!(off.expect("options").access, Access::Offline);
    for (name, value) in [
        ("HF_ENDPOINT", "huggingface.co"),
        ("HF_ENDPOINT", "https://user:secret@mirror.example"),
        ("HF_ENDPOINT", "https://mirror.example/?token=secret"),
        ("HF_TOKEN", "two words"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
    ] {
        let error = options(&[("HF_HOME", "/nowhere"), (name, value)]).expect_err(name);
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}

#[test]
fn the_token_file_is_read() {
    let home = tempfile::tempdir().expect("a folder");
    let folder = home.path().display().to_string();
    let token = |variables: &[(&str, &str)]| {
        options(&[&[("HF_HOME", folder.as_str())], variables].concat())
            .expect("options")
            .token
    };
    assert_eq!(token(&[]), None);
    std::fs::write(home.path().join("token"), "hf_saved\n").expect("written");
    assert_eq!(token(&[]), Some(Token::new("hf_saved").expect("a token")));
    assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
    assert_eq!(
        token(&[("HF_TOKEN", "hf_other")]),
        Some(Token::new("hf_other").expect("a token"))
    );
    std::fs::write(home.path().join("other"), "").expect("written");
    let other = home.path().join("other").display().to_string();
    assert_eq!(token(&[("HF_TOKEN_PATH", other.as_str())]), None);
}

proptest! {
    #[test]
    fn an_id_never_leads_out_of_the_cache(text in "[a-z./@\\\\-]{0,24}") {
        if let Some(id) = HubId::parse(&text) {
            let inside = |part: &str| Path::new(part).components().all(|part| matches!(part, std::path::Component::Normal(_)));
            prop_assert!(inside(id.repository()) && inside(id.revision()));
        }
    }
}
