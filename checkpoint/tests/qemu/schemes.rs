//! The two schemes: conversions that QEMU and libvirt go on with, and losses that no conversion
//! heals.

use tidemark_checkpoint::layers::is_valid;
use tidemark_checkpoint::{CreateFlags, DeleteFlags};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_qcow2::chain::Scheme;

use super::common::{content, spec};
use super::desk::{Desk, covers, since};
use super::failures::chain;

/// Which bitmaps record, as QEMU sees them.
fn recording(desk: &Desk) -> Vec<String> {
    let info = qemu_img::info(&desk.image("vda"));
    let bitmaps = info["format-specific"]["data"]["bitmaps"]
        .as_array()
        .unwrap()
        .clone();
    let auto = |bitmap: &&serde_json::Value| bitmap["flags"].to_string().contains("auto");
    let mut names: Vec<String> = bitmaps
        .iter()
        .filter(auto)
        .map(|bitmap| bitmap["name"].as_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_converted_chain_is_valid_for_libvirt_and_recorded_on_by_qemu() {
    tidemark_fixtures::require_qemu!();
    let (desk, moments) = chain(&["vda"]);
    let mut compared = 0;
    for (round, scheme) in [Scheme::Cumulative, Scheme::Intervals, Scheme::Cumulative]
        .into_iter()
        .enumerate()
    {
        desk.session(|domain| domain.set_scheme(scheme).unwrap());
        let bitmaps = desk.session(|domain| domain.disks()[0].image.bitmaps().unwrap());
        match scheme {
            Scheme::Cumulative => {
                assert_eq!(recording(&desk), ["a", "b", "c"]);
                let layers = [bitmaps];
                assert!(["a", "b", "c"].iter().all(|name| is_valid(&layers, name)));
            }
            Scheme::Intervals => assert_eq!(recording(&desk), ["c"]),
        }
        let start = 3072 + round * 256;
        desk.qemu_writes("vda", &[&format!("write -P {} {start}k 100k", round + 50)]);
        for (name, before) in &moments {
            desk.covers(name, "vda", before, &format!("{scheme:?}, since {name}"));
            compared += 1;
        }
        desk.assert_clean();
    }
    println!("{compared} answers");
}

#[test]
fn a_loss_is_converted_into_a_loss() {
    tidemark_fixtures::require_qemu!();
    let mut lost = 0;
    for harm in [qemu_img::bitmap_remove, qemu_img::bitmap_clear] {
        for scheme in [Scheme::Cumulative, Scheme::Intervals] {
            let (desk, moments) = chain(&["vda"]);
            if scheme == Scheme::Intervals {
                desk.session(|domain| domain.set_scheme(Scheme::Cumulative).unwrap());
            }
            harm(&desk.image("vda"), "b");
            desk.session(|domain| {
                domain.set_scheme(scheme).unwrap();
                let now = content(domain, "vda");
                for (name, before) in &moments {
                    match since(domain, name, "vda") {
                        Ok(bits) => covers(&bits, before, &now, name),
                        Err(_) => lost += 1,
                    }
                }
                assert!(since(domain, "b", "vda").is_err(), "{scheme:?}");
                assert!(since(domain, "c", "vda").is_ok(), "{scheme:?}");
                // It sticks through the way back and the next checkpoint.
                domain.set_scheme(Scheme::Intervals).unwrap();
                domain.create(&spec("d"), CreateFlags::NONE).unwrap();
                assert!(since(domain, "b", "vda").is_err());
                domain.delete("b", DeleteFlags::NONE).unwrap();
                assert!(since(domain, "c", "vda").is_ok());
                if let Ok(bits) = since(domain, "a", "vda") {
                    covers(
                        &bits,
                        &moments[0].1,
                        &content(domain, "vda"),
                        "after the deletion",
                    );
                }
            });
        }
    }
    println!("{lost} answers lost, none wrong");
    assert!(lost >= 4);
}
