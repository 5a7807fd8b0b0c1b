// Package cli is conex's command line, in Docker's grammar: one file per command, each of which reads its flags, makes one
// call of package engine and prints the result.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"conex/internal/config"
	"conex/internal/engine"
	"conex/internal/linux/slack"
)

// app is one invocation: where it reads and writes, what the global flags say, and the engine once a command needs it.
type app struct {
	// name is what the program was invoked as, "conex" or "docker"; help and messages say it.
	name     string
	in       *os.File
	out, err io.Writer

	root, state, config, driver string
	debug                       bool

	// progress is the value of --progress, for the commands that have it; with json errJSON is where errors go as objects too.
	progress string
	errJSON  io.Writer
	// lastJSON, if set, prints the error as the last object instead.
	lastJSON func(err error, code int)

	eng *engine.Engine
	// interrupted is the signal that ended the context of a long operation, 0 if none did.
	interrupted syscall.Signal
	// signalsTaken says that signals belong to an attached container now and do not end the operation any more.
	signalsTaken atomic.Bool
}

// Main runs the command line args (args[0] being the program's name) and returns the exit code.
func Main(args []string) int {
	a := &app{name: "conex", in: os.Stdin, out: os.Stdout, err: os.Stderr}
	if len(args) > 0 && filepath.Base(args[0]) == "docker" {
		a.name = "docker"
	}
	if len(args) > 0 {
		args = args[1:]
	}
	return a.run(context.Background(), args)
}

// run executes one command and turns its error into a message and an exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.rootCommand(args)
	root.SetArgs(args)
	return a.report(a.rootFlagError(root, root.ExecuteContext(ctx)))
}

// configuration is what the global flags, the environment and the configuration file (in this order) say.
func (a *app) configuration() (*config.Config, error) {
	path := a.config
	if path == "" {
		path = config.Path()
	}
	cfg, err := config.Load(path)
	if err != nil {
		return nil, err
	}
	for _, o := range []struct {
		dst       *string
		flag, env string
	}{{&cfg.Root, a.root, "CONEX_ROOT"}, {&cfg.State, a.state, "CONEX_STATE"}} {
		v := o.flag
		if v == "" {
			v = os.Getenv(o.env)
		}
		if v == "" {
			continue
		}
		if *o.dst, err = filepath.Abs(v); err != nil {
			return nil, err
		}
	}
	if v := os.Getenv("CONEX_BUILD_PARALLELISM"); v != "" {
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			return nil, fmt.Errorf("CONEX_BUILD_PARALLELISM: %q is no number of steps", v)
		}
		cfg.Build.MaxParallelism = int(n)
	}
	switch a.driver {
	case "":
	case "erofs", "dir":
		cfg.StorageDriver = a.driver
	default:
		return nil, fmt.Errorf("unknown storage driver %q: there are erofs and dir", a.driver)
	}
	if a.debug {
		fmt.Fprintf(a.err, "%s: debug: configuration %s, root %s, state %s, storage driver %q\n", a.name, path, cfg.Root, cfg.State, cfg.StorageDriver)
	}
	return cfg, nil
}

// engine opens the engine that the configuration describes.
func (a *app) engine() (*engine.Engine, error) {
	if a.eng != nil {
		return a.eng, nil
	}
	cfg, err := a.configuration()
	if err != nil {
		return nil, err
	}
	if a.eng, err = engine.Open(cfg); err != nil {
		if errors.Is(err, os.ErrPermission) && os.Geteuid() != 0 {
			return nil, fmt.Errorf("%w (conex needs root for now: try sudo)", err)
		}
		return nil, err
	}
	return a.eng, nil
}

// settleAfter is how long an operation takes that is no short command any more: it has more threads than one to wake in time.
const settleAfter = 100 * time.Millisecond

// withEngine calls fn with the engine and a context that the first signal ends.
func (a *app) withEngine(cmd *cobra.Command, fn func(ctx context.Context, e *engine.Engine) error) error {
	e, err := a.engine()
	if err != nil {
		return err
	}
	ctx, stop := a.interruptible(cmd.Context())
	defer stop()
	return fn(ctx, e)
}

// interruptible returns a context that ends with the first SIGINT, SIGTERM or SIGHUP. stop undoes the catch; report tells an
// operation that was ended so from one that failed.
func (a *app) interruptible(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ch := make(chan os.Signal, 1)
	done := make(chan struct{})
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		defer close(done)
		long := time.NewTimer(settleAfter)
		defer long.Stop()
		for {
			select {
			case <-long.C:
				slack.Settle()
				continue
			case s := <-ch:
				if a.signalsTaken.Load() {
					continue
				}
				a.interrupted = s.(syscall.Signal)
				signal.Stop(ch) // a second signal ends the program at once, if cleaning up takes too long for the user
				cancel()
			case <-ctx.Done():
			}
			return
		}
	}()
	return ctx, func() {
		cancel()
		<-done
		signal.Stop(ch)
	}
}

// exitError ends the program with code. A nil err says nothing more, since the user has seen why.
type exitError struct {
	code int
	err  error
	// help names the command whose --help would have avoided the error, "" for none.
	help string
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// exit returns the error that ends the program silently with code, nil for 0.
func exit(code int) error {
	if code == 0 {
		return nil
	}
	return &exitError{code: code}
}

// objectError prints as Docker's client itself says it: "Error: No such object: x".
type objectError struct{ name string }

func (e *objectError) Error() string { return "No such object: " + e.name }

// report prints err for people, one line for each error in it, and returns the exit code: the one place that maps errors.
func (a *app) report(err error) int {
	if err == nil {
		return 0
	}
	if a.interrupted != 0 && errors.Is(err, context.Canceled) {
		if a.errJSON != nil {
			a.reportJSON(errors.New("interrupted"), 128+int(a.interrupted))
		}
		return 128 + int(a.interrupted)
	}
	code := 1
	help := ""
	var ee *exitError
	var ge *engine.ExitError
	switch {
	case errors.As(err, &ee):
		code, help = ee.code, ee.help
		if ee.err == nil {
			return code
		}
	case errors.As(err, &ge):
		code = ge.Code
		if ge.Err == nil {
			return code
		}
	}
	if a.errJSON != nil {
		a.reportJSON(err, code)
		if a.errJSON == a.err {
			return code
		}
	}
	if errors.Is(err, engine.ErrInsists) {
		fmt.Fprintf(a.err, "\n%s\n", engine.ErrInsists)
		return code
	}
	told := map[string]bool{}
	for _, e := range flatten(err) {
		var oe *objectError
		if errors.As(e, &oe) {
			fmt.Fprintf(a.err, "Error: %s\n", oe)
			continue
		}
		hint := ""
		if errors.Is(e, os.ErrPermission) && os.Geteuid() != 0 && !strings.Contains(e.Error(), "needs root") {
			hint = " (conex needs root for now: try sudo)"
		}
		if a.eng != nil {
			h := a.eng.Hint(e)
			if told[h] {
				continue // what else went wrong because the disk is full is no news
			}
			if h != "" {
				told[h] = true
				hint = " (" + h + ")"
			}
		}
		first, rest, more := strings.Cut(cleanLines(strings.TrimRight(e.Error(), "\n")), "\n")
		if more {
			rest = "\n" + rest
		}
		fmt.Fprintf(a.err, "%s: %s%s%s\n", a.name, first, hint, rest)
		if a.debug {
			for c := e; c != nil; c = errors.Unwrap(c) {
				fmt.Fprintf(a.err, "%s: debug: %T: %v\n", a.name, c, c)
			}
		}
	}
	if help != "" {
		fmt.Fprintf(a.err, "See '%s --help'.\n", help)
	}
	return code
}

// reportJSON prints err as the last object of --progress json. Where that is standard output, standard error has the line for people.
func (a *app) reportJSON(err error, code int) {
	if a.lastJSON != nil {
		a.lastJSON(err, code)
		return
	}
	text := cleanLines(strings.TrimRight(err.Error(), "\n"))
	writeJSON(a.errJSON, jsonMessage{Error: text, Why: &jsonError{Code: code, Message: text}})
}

// flatten returns the errors that errors.Join has put together.
func flatten(err error) []error {
	inner := err
	if ee, ok := err.(*exitError); ok {
		inner = ee.err
	}
	if joined, ok := inner.(interface{ Unwrap() []error }); ok && fmt.Sprintf("%T", inner) == "*errors.joinError" {
		var all []error
		for _, e := range joined.Unwrap() {
			all = append(all, flatten(e)...)
		}
		return all
	}
	return []error{err}
}

// each calls fn for every name, goes on after errors, and prints the names of those that went well.
func (a *app) each(names []string, fn func(name string) error) error {
	var errs []error
	for _, n := range names {
		if err := fn(n); err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintln(a.out, n)
	}
	return errors.Join(errs...)
}

// together is each for what may take long or wait: up to atOnce at a time. What is printed, and the errors, come in the order of names.
func (a *app) together(names []string, fn func(name string) error) []error {
	errs := make([]error, len(names))
	done := make([]chan struct{}, len(names))
	for i := range done {
		done[i] = make(chan struct{})
	}
	next := make(chan int, len(names))
	for i := range names {
		next <- i
	}
	close(next)
	for range min(atOnce, len(names)) {
		go func() { // ends when all is done, which is waited for
			for i := range next {
				errs[i] = fn(names[i])
				close(done[i])
			}
		}()
	}
	for i, n := range names {
		<-done[i]
		if errs[i] == nil {
			fmt.Fprintln(a.out, n)
		}
	}
	return slices.DeleteFunc(errs, func(err error) bool { return err == nil })
}

// atOnce is how many containers a command stops, kills, pauses or removes at a time.
const atOnce = 16

// Version is the program's version; the build sets it.
var Version = "0.1.0-dev"

// commit returns the revision that the binary was built of, and the time of it, as the Go toolchain recorded them.
func commit() (revision, when string) {
	bi, ok := debug.ReadBuildInfo()
	if !ok {
		return "", ""
	}
	for _, s := range bi.Settings {
		switch s.Key {
		case "vcs.revision":
			revision = s.Value[:min(len(s.Value), 7)]
		case "vcs.time":
			when = s.Value
		}
	}
	return revision, when
}
