//! Names of repositories, revisions and files: none leads out of a folder.
#![no_main]

use std::path::Component;

use libfuzzer_sys::fuzz_target;
use mlx_engine_hub::{HubReference, RepoPath};

fuzz_target!(|text: &str| {
    let _ = text.parse::<HubReference>();
    if let Ok(path) = text.parse::<RepoPath>() {
        let inside = |component: Component| matches!(component, Component::Normal(_));
        assert!(path.to_path().components().all(inside), "{text:?}");
    }
});
