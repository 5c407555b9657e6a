//! Which disks a command acts on: options, a domain definition, or one image.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::Place;
use serde_json::Value;

fn names(list: &Value) -> Vec<&str> {
    let infos = list.as_array().unwrap();
    infos
        .iter()
        .map(|info| info["name"].as_str().unwrap())
        .collect()
}

#[test]
fn several_disks_share_a_moment_and_a_definition_names_them() {
    let place = Place::new();
    place.ok("create one 8M");
    place.ok("create two 8M");
    place.ok("checkpoint create a --disk vda=one --disk vdb=two");
    let list = place.json("checkpoint list --disk vdb=two --disk vda=one");
    assert_eq!(list[0]["disks"][0]["name"], "vda");
    assert_eq!(list[0]["disks"][1]["name"], "vdb");
    let disk = |name: &str, file: &str, format: &str| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}'/>\
             <source file='{}'/><target dev='{name}'/></disk>",
            place.path(file).display()
        )
    };
    let xml = format!(
        "<domain type='kvm'><name>vm</name><devices>{}{}{}</devices></domain>",
        disk("vda", "one", "qcow2"),
        disk("vdb", "two", "qcow2"),
        disk("vdc", "three", "raw")
    );
    std::fs::write(place.path("vm.xml"), xml).unwrap();
    let answer = place
        .run("checkpoint create b --domain-xml vm.xml --metadata m")
        .ends_with(0);
    assert!(answer.stderr.contains("vdc"), "{}", answer.stderr);
    let list = place.json("checkpoint list --domain-xml vm.xml --metadata m");
    assert_eq!(names(&list), ["a", "b"]);
    let descriptor = std::fs::read_to_string(place.path("m/b.xml")).unwrap();
    assert!(descriptor.contains("<name>vm</name>"), "{descriptor}");
    place
        .run("checkpoint list --disk vda=one --domain-xml vm.xml")
        .ends_with(64);
    place.run("checkpoint list --disk one").ends_with(64);
    place.run("checkpoint list").ends_with(64);
    place
        .run("checkpoint create c --disk vda=one --disk vda=two")
        .ends_with(64);
}
