//! Images with an external data file on the command line: made as qemu-img makes them, described as
//! it describes them.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::{Place, assert_same, without};
use tidemark_fixtures::oracle::qemu_img;
use tidemark_fixtures::require_qemu;

#[test]
fn create_makes_data_files_that_qemu_img_describes_in_the_same_way() {
    require_qemu!();
    let place = Place::new();
    for raw in ["on", "off"] {
        // Both run in the folder of the image, so that a relative name means one file.
        let options = format!("data_file=data.raw,data_file_raw={raw},lazy_refcounts=on");
        place.ok(&format!("create -o {options} a 3M"));
        let made = std::fs::read(place.path("data.raw")).unwrap();
        assert_eq!(made, vec![0; 3 << 20]);
        let (code, _) = place.qemu_img(&["create", "-f", "qcow2", "-o", &options, "b", "3M"]);
        assert_eq!(code, 0);
        let (_, ours) = place.qemu_img(&["info", "--output=json", "a"]);
        let (_, theirs) = place.qemu_img(&["info", "--output=json", "b"]);
        assert_eq!(ours["format-specific"], theirs["format-specific"]);
        assert_same("info", &without(place.json("info a"), "tidemark"), &ours);
        let (_, counted) = place.qemu_img(&["check", "--output=json", "a"]);
        assert_same(
            "check",
            &without(place.json("check a"), "tidemark"),
            &counted,
        );
        let path = place.path("a").display().to_string();
        std::fs::create_dir_all(place.path("elsewhere")).unwrap();
        place.ok(&format!("map {path}"));
        assert!(place.json("map a").is_array());
    }
}

#[test]
fn map_and_check_agree_with_qemu_img() {
    require_qemu!();
    let place = Place::new();
    let data = place.path("data.raw").display().to_string();
    for raw in ["on", "off"] {
        place.create(
            "disk",
            3 << 20,
            &[("data_file", &data), ("data_file_raw", raw)],
        );
        place.write(
            "disk",
            &["write 0 64k", "write 1M 100k", "write -z 2M 128k"],
        );
        for command in ["info", "check"] {
            let (_, theirs) = place.qemu_img(&[command, "-f", "qcow2", "--output=json", "disk"]);
            let ours = without(place.json(&format!("{command} disk")), "tidemark");
            assert_same(&format!("{command}, raw {raw}"), &ours, &theirs);
        }
        let (_, theirs) = place.qemu_img(&["map", "-f", "qcow2", "--output=json", "disk"]);
        let mut ours = place.json("map disk");
        for entry in ours.as_array_mut().unwrap() {
            // qemu-img leaves an offset out that does not apply.
            if entry["offset"].is_null() {
                entry.as_object_mut().unwrap().remove("offset");
            }
        }
        assert_same(&format!("map, raw {raw}"), &ours, &theirs);
    }
}

#[test]
fn a_data_file_that_cannot_be_is_refused_before_anything_is_replaced() {
    let place = Place::new();
    place.ok("create disk 1M");
    place.ok("create base 1M");
    std::fs::write(place.path("data"), b"old").unwrap();
    std::os::unix::fs::symlink("disk", place.path("link")).unwrap();
    let before = std::fs::read(place.path("disk")).unwrap();
    for wrong in [
        "create -o data_file_raw=on disk 1M",
        "create -o data_file= disk 1M",
        "create -o data_file=disk disk 1M",
        "create -o data_file=./disk disk 1M",
        "create -o data_file=link disk 1M",
        "create -o data_file=new new 1M",
        "create -o data_file=nbd://host/x disk 1M",
        "create -o data_file=data,compat=0.10 disk 1M",
        "create -o data_file=data,data_file_raw=maybe disk 1M",
        "create -o data_file=data,data_file_raw=on -b base -F qcow2 disk 1M",
        "create -o lazy_refcounts=on,compat=0.10 disk 1M",
    ] {
        place.run(wrong).ends_with(64);
    }
    place
        .run("create -o data_file=no/such/place disk 1M")
        .ends_with(1);
    assert_eq!(std::fs::read(place.path("disk")).unwrap(), before);
    assert_eq!(std::fs::read(place.path("data")).unwrap(), b"old");
    assert!(!place.path("new").exists());
}

#[test]
fn without_its_data_file_an_image_still_answers_for_itself() {
    let place = Place::new();
    place.ok("create -o data_file=data disk 1M");
    std::fs::remove_file(place.path("data")).unwrap();
    place.ok("info disk");
    place.ok("check disk");
    place.ok("bitmap add disk b");
    place.ok("bitmap disable disk b");
    assert_eq!(place.json("bitmap list disk")[0]["name"], "b");
    let answer = place.run("map disk").ends_with(1);
    assert!(answer.stderr.contains("data"), "{}", answer.stderr);
    place.run("map --no-backing disk").ends_with(1);
}

#[test]
fn a_raw_disk_has_checkpoints_and_incremental_backups() {
    require_qemu!();
    let place = Place::new();
    let data = place.path("data.raw").display().to_string();
    let options = format!("data_file={data},data_file_raw=on");
    place.ok(&format!("create -o {options} disk 4M"));
    place.write("disk", &["write -P 1 0 1M"]);
    place.ok("backup --to to --checkpoint a disk");
    place.write("disk", &["write -P 2 64k 64k", "write -z 512k 64k"]);
    let made = place.json("backup --to to --checkpoint b --since a disk");
    assert_eq!(made["disks"][0]["mode"], "incremental", "{made}");
    let bytes = made["disks"][0]["bytes"].as_u64().unwrap();
    assert!(bytes < 2 << 20, "{bytes} bytes of 4 MiB");
    place.write("disk", &["write -P 3 3M 64k"]);
    let at_b = {
        let mut content = vec![0; 4 << 20];
        content[..1 << 20].fill(1);
        content[65_536..131_072].fill(2);
        content[512 << 10..(512 << 10) + 65_536].fill(0);
        content
    };
    place.ok("restore --from to --disk vda --at b --to out --format raw");
    assert!(std::fs::read(place.path("out")).unwrap() == at_b);
    let mut now = at_b;
    now[3 << 20..(3 << 20) + 65_536].fill(3);
    assert!(
        std::fs::read(&data).unwrap() == now,
        "the data file is the disk"
    );
    let (code, _) = place.qemu_img(&["check", "-q", "disk"]);
    assert_eq!(code, 0);
    assert!(qemu_img::convert_to_raw(&place.path("disk")) == now);
}
