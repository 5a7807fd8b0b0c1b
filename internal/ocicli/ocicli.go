// Package ocicli is the OCI runtime command line: what containerd, Docker, Podman and people call as they call runc, by the name
// conex-runtime (a link to conex) or as `conex runtime`.
//
// It owns the folder --root, one folder a container:
//
//	<root>/<id>/lock         held while somebody creates, starts or deletes the container
//	            config.json  the bundle's, as it was at create
//	            start        a named pipe; a container that waits for its start reads it
//	            report       what the waiting process writes when its command can't be executed
//	            state.json   written last: with it the container exists
//
// Commands meet in these files and in the kernel alone; nothing of ours runs between them.
package ocicli

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"conex/internal/linux/mount"
	"conex/internal/ocicli/shield"

	"golang.org/x/sys/unix"
)

// Name is the name to call conex by for this command line.
const Name = "conex-runtime"

// DefaultRoot is where containers' folders lie without --root.
const DefaultRoot = "/run/conex-runtime"

// app is one invocation.
type app struct {
	root          string
	log           string
	logFormat     string
	systemdCgroup bool
	debug         bool
	rootless      string
	// shielded says that package shield has done its work.
	shielded bool
}

// exitCode ends a command with a container's code, without a message.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// command is one word of the command line. usage are its arguments; min and max bound their number, max -1 does not.
type command struct {
	name, usage, short string
	min, max           int
	flags              func(fs *flag.FlagSet) func(a *app, args []string) error
}

// Main runs the command line and returns its exit code: a container's for run and exec, else 0 or 1.
func Main(args []string) int {
	a := &app{}
	err := a.unshield()
	if err == nil && !a.shielded && shield.Wanted(args) {
		shield.Execute() // here too, whatever the program is called
	}
	if err == nil {
		err = a.main(args)
	}
	var code exitCode
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	}
	a.report(err)
	return 1
}

// unshield ends what package shield began: from now on nobody executes this program by way of its process.
func (a *app) unshield() error {
	fd, err := strconv.Atoi(os.Getenv(shield.Env))
	if err != nil {
		return nil // started without
	}
	a.shielded = true
	if err := os.Unsetenv(shield.Env); err != nil {
		return err
	}
	if os.Getenv("GOMAXPROCS") == shield.Procs {
		if err := os.Unsetenv("GOMAXPROCS"); err != nil {
			return err
		}
	}
	self := os.NewFile(uintptr(fd), "self")
	if self == nil {
		return nil
	}
	defer self.Close()
	if err := mount.ForbidExecution(self); err != nil {
		return fmt.Errorf("forbid execution of the runtime: %w", err)
	}
	// Executed through a descriptor we would be called by its number.
	if unix.Gettid() != os.Getpid() { // the process's name is its first thread's
		return os.WriteFile("/proc/self/comm", []byte(Name), 0)
	}
	name := append([]byte(Name), 0)
	return unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0)
}

func (a *app) main(args []string) error {
	fs := flag.NewFlagSet(Name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&a.root, "root", DefaultRoot, "")
	fs.StringVar(&a.log, "log", "", "")
	fs.StringVar(&a.logFormat, "log-format", "text", "")
	fs.BoolVar(&a.systemdCgroup, "systemd-cgroup", false, "")
	fs.BoolVar(&a.debug, "debug", false, "")
	fs.StringVar(&a.rootless, "rootless", "auto", "")
	var version, help bool
	fs.BoolVar(&version, "version", false, "")
	fs.BoolVar(&version, "v", false, "")
	fs.BoolVar(&help, "help", false, "")
	fs.BoolVar(&help, "h", false, "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	switch {
	case version:
		return printVersion(os.Stdout)
	case help || fs.NArg() == 0 || fs.Arg(0) == "help":
		return usage(os.Stdout)
	case a.logFormat != "text" && a.logFormat != "json":
		return fmt.Errorf("--log-format %q is none of text, json", a.logFormat)
	case a.rootless == "true":
		return errors.New("--rootless: containers of users other than root are not supported yet")
	}
	var err error
	if a.root, err = filepath.Abs(a.root); err != nil {
		return err
	}
	for _, c := range commands() {
		if c.name == fs.Arg(0) {
			return a.command(c, fs.Args()[1:])
		}
	}
	return fmt.Errorf("no command %q; %s help lists them", fs.Arg(0), Name)
}

func (a *app) command(c command, args []string) error {
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	run := c.flags(fs)
	err := fs.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return commandUsage(os.Stdout, c, fs)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	if n := fs.NArg(); n < c.min || c.max >= 0 && n > c.max {
		return fmt.Errorf("%s: %d arguments given, want: %s %s %s", c.name, n, Name, c.name, c.usage)
	}
	return run(a, fs.Args())
}

// report tells the caller of an error: on standard error, and in --log in the form that callers parse.
func (a *app) report(err error) {
	now := time.Now()
	err = errors.New(strings.ReplaceAll(err.Error(), "\n", ": ")) // one line, whatever was joined
	fmt.Fprintf(os.Stderr, "time=%q level=error msg=%q\n", now.Format(time.RFC3339), err.Error())
	if a.log == "" {
		return
	}
	line := fmt.Sprintf("time=%q level=error msg=%q\n", now.Format(time.RFC3339), err.Error())
	if a.logFormat == "json" {
		b, jerr := json.Marshal(struct {
			Level string `json:"level"`
			Msg   string `json:"msg"`
			Time  string `json:"time"`
		}{"error", err.Error(), now.Format(time.RFC3339)})
		if jerr != nil {
			return
		}
		line = string(b) + "\n"
	}
	f, oerr := os.OpenFile(a.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if oerr == nil {
		_, oerr = f.WriteString(line)
		oerr = errors.Join(oerr, f.Close())
	}
	if oerr != nil {
		fmt.Fprintf(os.Stderr, "time=%q level=error msg=%q\n", now.Format(time.RFC3339), "write log: "+oerr.Error())
	}
}

// warn tells of what does not stop a command.
func (a *app) warn(err error) {
	fmt.Fprintf(os.Stderr, "time=%q level=warning msg=%q\n", time.Now().Format(time.RFC3339), err.Error())
}

func usage(w io.Writer) error {
	fmt.Fprintf(w, `Usage: %s [global options] command [options] [arguments]

An OCI runtime: runs containers from bundles, as runc does.

Commands:
`, Name)
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-12s%s\n", c.name, c.short)
	}
	_, err := fmt.Fprintf(w, `
Global options:
  --root FOLDER              containers' state (default %s)
  --log FILE                 errors go there too
  --log-format text|json     their form in the file
  --systemd-cgroup           cgroupsPath is "slice:prefix:name", made by systemd
  --rootless true|false|auto
  --debug
  --version, --help
`, DefaultRoot)
	return err
}

func commandUsage(w io.Writer, c command, fs *flag.FlagSet) error {
	fmt.Fprintf(w, "Usage: %s %s [options] %s\n\n%s\n", Name, c.name, c.usage, c.short)
	var names []string
	fs.VisitAll(func(f *flag.Flag) {
		dash := "--"
		if len(f.Name) == 1 {
			dash = "-"
		}
		names = append(names, "  "+dash+f.Name)
	})
	if len(names) == 0 {
		return nil
	}
	_, err := fmt.Fprintf(w, "\nOptions:\n%s\n", strings.Join(names, "\n"))
	return err
}
