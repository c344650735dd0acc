//! How the engine's process is started and ended.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// Starts processes that [`serve`](super::serve).
pub trait Launch: Send + 'static {
    /// Starts one, with this end of its connection.
    ///
    /// # Errors
    ///
    /// Why it could not be started.
    fn launch(&mut self, connection: UnixStream) -> io::Result<Box<dyn Process>>;
}

/// A process that was started.
pub trait Process: Send {
    /// Its number, where it has one.
    fn id(&self) -> Option<u32>;

    /// Ends it at once, whatever it does.
    ///
    /// # Errors
    ///
    /// Why it could not be ended.
    fn kill(&mut self) -> io::Result<()>;

    /// Waits for its end and says how it ended.
    ///
    /// # Errors
    ///
    /// Why it could not be waited for.
    fn wait(&mut self) -> io::Result<String>;
}

/// A program and its arguments.
///
/// The connection is the program's standard input; what it prints goes to the standard error of this process. It is in a
/// process group of its own: Ctrl-C in a terminal is for the program that asked, which may have other plans than to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

impl Program {
    /// A program, by path or by name.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            path: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// The program that runs now.
    ///
    /// # Errors
    ///
    /// Where the system does not know it.
    pub fn this() -> io::Result<Self> {
        Ok(Self::new(std::env::current_exe()?))
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Sets a variable of its environment, beside those of this process.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }
}

impl Launch for Program {
    fn launch(&mut self, connection: UnixStream) -> io::Result<Box<dyn Process>> {
        let stderr = io::stderr().as_fd().try_clone_to_owned()?;
        let child = Command::new(&self.path)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(OwnedFd::from(connection))
            .stdout(Stdio::from(stderr))
            .process_group(0)
            .spawn()?;
        Ok(Box::new(child))
    }
}

impl Process for Child {
    fn id(&self) -> Option<u32> {
        Some(Child::id(self))
    }

    fn kill(&mut self) -> io::Result<()> {
        Child::kill(self)
    }

    fn wait(&mut self) -> io::Result<String> {
        Child::wait(self).map(|status| status.to_string())
    }
}
