package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"conex/internal/build"
	"conex/internal/engine"
	"conex/internal/linux/tty"
)

func (a *app) buildShellCommand() *cobra.Command {
	var req engine.BuildShellRequest
	var runs buildRunFlags
	cmd := &cobra.Command{
		Use: "shell [OPTIONS] [BUILD|IMAGE] [-- COMMAND [ARG...]]", Short: "Open a shell at a step of an earlier build (default: where the last build failed or ended)",
		RunE: func(cmd *cobra.Command, args []string) error {
			if n := cmd.ArgsLenAtDash(); n >= 0 {
				args, req.Args = args[:n], args[n:]
			}
			if len(args) > 1 {
				return a.usageError(cmd, fmt.Errorf("%s takes one build or image; a command stands after --", cmd.CommandPath()))
			}
			if len(req.Args) > 0 && req.Shell != "" {
				return a.usageError(cmd, errors.New("--shell and a command can't be used together"))
			}
			if err := runs.apply(&req.Request); err != nil {
				return a.usageError(cmd, err)
			}
			req.Name = first(args)
			e, err := a.engine()
			if err != nil {
				return err
			}
			_, keys := terminal(a.in)
			_, screen := terminal(a.out)
			c := &req.Console
			*c = build.Console{In: a.in, Out: a.out, Err: a.err, Terminal: keys && screen}
			if c.Terminal {
				req.Note = a.shellNote
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			code, err := a.atConsole(c, func() (int, error) { return e.BuildShell(ctx, req) })
			if errors.Is(err, build.ErrNoShell) {
				return fmt.Errorf("%w: name one with --shell, or a command after --", err)
			}
			if err != nil {
				return err
			}
			return exit(code)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.At, "at", "", `The step: a number ("3", "stage:3"), "#7" of the display, "L12" for a line of the Dockerfile, a stage's name, or a piece of the instruction`)
	f.BoolVar(&req.Before, "before", false, "The file system that the step began with")
	f.StringVar(&req.Shell, "shell", "", "The shell (default: the stage's, bash or sh)")
	runs.register(f)
	return cmd
}

// shellNote says where a shell is.
func (a *app) shellNote(r *build.BuildRecord, s *build.StepRecord, before bool) {
	when := "after"
	if before {
		when = "before"
	}
	fmt.Fprintf(a.err, "build %s, %s %s\n", r.ID, when, clean(firstOf(s.Name)))
	if !s.HasResult() {
		fmt.Fprintln(a.err, `that step has no result: this is what it began with ("build --debug" opens a shell at the moment of failure)`)
	}
}

func firstOf(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// atConsole runs what talks to a console, the user's terminal being in raw mode meanwhile.
func (a *app) atConsole(c *build.Console, run func() (int, error)) (int, error) {
	if !c.Terminal {
		return run()
	}
	s, err := a.attach(sessionOptions{stdin: true, tty: true, signals: true})
	if err != nil {
		return 0, err
	}
	sizes, stop := make(chan tty.Size, 2), make(chan struct{})
	var passing sync.WaitGroup
	select { // the first size is there already
	case sz := <-s.sizes:
		sizes <- tty.Size(sz)
	default:
	}
	passing.Go(func() {
		for {
			select {
			case sz := <-s.sizes:
				select {
				case sizes <- tty.Size(sz):
				case <-stop:
					return
				}
			case <-stop:
				return
			}
		}
	})
	c.Sizes = sizes
	code, err := run()
	s.close()
	close(stop)
	passing.Wait()
	return code, err
}

// debugger is build --debug: it shows a step that failed, opens a shell there, and asks what next.
type debugger struct {
	a    *app
	view *buildView
	// shell is --shell's value.
	shell string
}

// ask implements build.Request.Debug.
func (d *debugger) ask(ctx context.Context, f *build.Failure) (build.Decision, error) {
	d.view.pause()
	defer d.view.resume()
	fmt.Fprintf(d.a.err, "\n%s\n", cleanLines(f.Error()))
	open := true
	for {
		if open {
			fmt.Fprintln(d.a.err, "A shell in the step's file system, as the command left it; its end asks what next.")
			c := &build.Console{In: d.a.in, Out: d.a.err, Err: d.a.err, Terminal: true}
			_, err := d.a.atConsole(c, func() (int, error) { return f.Shell(ctx, d.shell, c) })
			switch {
			case ctx.Err() != nil:
				return build.Stop, ctx.Err()
			case errors.Is(err, build.ErrNoShell):
				fmt.Fprintf(d.a.err, "%v: name one with --shell\n", err)
			case err != nil:
				fmt.Fprintf(d.a.err, "%v\n", err)
			}
		}
		fmt.Fprint(d.a.err, `r  run the step again, on its files as they were
k  run it again, and keep what has changed (not cached)
c  continue with the file system as it is (not cached)
d  another shell
s  stop the build
What next? [s] `)
		answer, ok := d.line(ctx)
		if ctx.Err() != nil {
			return build.Stop, ctx.Err()
		}
		open = false
		switch strings.ToLower(answer) {
		case "r", "retry":
			return build.Retry, nil
		case "k", "keep":
			return build.RetryKept, nil
		case "c", "continue":
			return build.Continue, nil
		case "d", "shell":
			open = true
		case "", "s", "stop", "q", "quit":
			return build.Stop, nil
		}
		if !ok {
			return build.Stop, nil
		}
	}
}

// line reads a line from the terminal, no byte more. ok is false at its end, and when ctx ends.
func (d *debugger) line(ctx context.Context) (s string, ok bool) {
	stopped, stop, err := os.Pipe()
	if err != nil {
		return "", false
	}
	defer stopped.Close()
	closing := sync.OnceFunc(func() { stop.Close() })
	defer closing()
	defer context.AfterFunc(ctx, closing)()
	var b [1]byte
	var line []byte
	for {
		if ok, err := tty.Ready(d.a.in, stopped); err != nil || !ok {
			return "", false
		}
		n, err := d.a.in.Read(b[:])
		if n == 0 || err != nil {
			return strings.TrimSpace(string(line)), false
		}
		if b[0] == '\n' || b[0] == '\r' {
			return strings.TrimSpace(string(line)), true
		}
		line = append(line, b[0])
	}
}

// errNoTerminal is what --debug ends with where nobody sits.
var errNoTerminal = errors.New(`--debug needs a terminal: it opens a shell where a step fails; without one, look at the step later with "build shell"`)

// debugBuild makes a request ask the user about steps that fail.
func (a *app) debugBuild(req *engine.BuildRequest, view *buildView, shell string) error {
	_, keys := terminal(a.in)
	if _, screen := terminal(a.err); !keys || !screen || req.Stdin != nil {
		return errNoTerminal
	}
	req.Debug = (&debugger{a: a, view: view, shell: shell}).ask
	return nil
}
