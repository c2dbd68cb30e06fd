//! What an operator can ask for through the environment. A process reads the variable once, so each case is a process
//! of its own: this test runs itself.

#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

use granary_placement::codec::kernel::KERNEL_VARIABLE;
use granary_placement::codec::{kernel_name, self_test, Codec, Kernel};

/// The other tests run this one again, with the variable set, and read what it prints.
#[test]
fn unless_told_otherwise_codecs_use_the_fastest_kernel_and_pass_the_self_test() {
    println!("kernel={} codec={} self_test={:?}", kernel_name(), Codec::new(4, 2).unwrap().kernel(), self_test());
    if std::env::var_os(KERNEL_VARIABLE).is_none() {
        assert_eq!(Some(Codec::new(4, 2).unwrap().kernel()), Kernel::available().next());
        assert_eq!(self_test(), Ok(()));
    }
}

fn run_with(name: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "unless_told_otherwise_codecs_use_the_fastest_kernel_and_pass_the_self_test", "--nocapture"])
        .env(KERNEL_VARIABLE, name)
        .output()
        .unwrap()
}

#[test]
fn every_kernel_of_this_cpu_can_be_forced_and_passes_the_self_test() {
    for kernel in Kernel::available() {
        let output = String::from_utf8(run_with(kernel.name()).stdout).unwrap();
        assert!(output.contains(&format!("kernel={kernel} codec={kernel} self_test=Ok(())")), "{output}");
    }
}

#[test]
fn an_unknown_kernel_fails_the_self_test_with_the_names_that_work() {
    let output = String::from_utf8(run_with("warp").stdout).unwrap();
    assert!(output.contains("self_test=Err(Kernel { name: \"warp\""), "{output}");
    assert!(output.contains("scalar"), "{output}");
}
