//! The `granary` command; see [`granary_gateway::cli`].

fn main() -> std::process::ExitCode {
    granary_gateway::cli::main()
}
