package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) runCommand() *cobra.Command {
	var c containerFlags
	var detach, sigProxy bool
	var detachKeys string
	cmd := &cobra.Command{
		Use: "run [OPTIONS] IMAGE [COMMAND] [ARG...]", Short: "Create and run a new container from an image", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := a.createRequest(cmd, &c, args)
			if err != nil {
				return runError(err)
			}
			return a.runContainer(cmd.Context(), runOptions{req: req, cidfile: c.meta.cidfile, detach: detach, sigProxy: sigProxy, keys: detachKeys, attach: len(c.process.attach) > 0})
		},
	}
	f := cmd.Flags()
	c.register(f)
	f.BoolVarP(&detach, "detach", "d", false, "Run container in background and print container ID")
	f.StringVar(&detachKeys, "detach-keys", "", "Override the key sequence for detaching a container")
	f.BoolVar(&sigProxy, "sig-proxy", true, "Proxy received signals to the process")
	return cmd
}

// createRequest checks the flags and makes the request that run and create share.
func (a *app) createRequest(cmd *cobra.Command, c *containerFlags, args []string) (engine.CreateRequest, error) {
	t, err := c.configs(cmd.Flags(), args)
	if err != nil {
		return engine.CreateRequest{}, a.usageError(cmd, err)
	}
	if c.meta.cidfile != "" {
		if _, err := os.Stat(c.meta.cidfile); err == nil {
			return engine.CreateRequest{}, fmt.Errorf("container ID file found, make sure the other container isn't running or delete %s", c.meta.cidfile)
		}
	}
	return engine.CreateRequest{
		Name: c.meta.name, Platform: c.meta.platform, Pull: c.meta.pull, Quiet: c.meta.quiet,
		Config: t.config, HostConfig: t.host, Options: *t.options, Networks: t.networks,
	}, nil
}

type runOptions struct {
	req              engine.CreateRequest
	cidfile, keys    string
	detach, sigProxy bool
	// attach says that -a was given.
	attach bool
}

func (a *app) runContainer(ctx context.Context, o runOptions) error {
	cfg := o.req.Config
	if err := checkKeys(o.keys); err != nil {
		return err
	}
	if o.detach {
		if o.attach {
			return errors.New("conflicting options: cannot specify both --attach and --detach")
		}
		cfg.AttachStdin, cfg.AttachStdout, cfg.AttachStderr, cfg.StdinOnce = false, false, false, false
	} else if err := a.checkTTY(cfg.AttachStdin, cfg.Tty); err != nil {
		return err
	}
	e, err := a.engine()
	if err != nil {
		return runError(err)
	}
	req := engine.RunRequest{CreateRequest: o.req, Detach: o.detach}
	ctx, stop := a.interruptible(ctx)
	defer stop()
	progress := a.pullProgress(a.err, o.req.Quiet)
	defer progress.close()
	req.Progress = progress.event
	var s *session
	if !o.detach {
		if s, err = a.attach(sessionOptions{stdin: cfg.AttachStdin, tty: cfg.Tty, later: true, detachKeys: o.keys}); err != nil {
			return runError(err)
		}
		defer s.close()
		req.Streams = s.streams
		if !cfg.AttachStdout {
			req.Streams.Stdout = nil
		}
		if !cfg.AttachStderr {
			req.Streams.Stderr = nil
		}
	}
	var proxy chan os.Signal
	if !o.detach && o.sigProxy {
		proxy = make(chan os.Signal, 16)
		req.Streams.Signals = proxy
		defer signal.Stop(proxy)
	}
	req.OnCreated = func(id string) error {
		progress.close()
		if proxy != nil {
			// From here on signals are the container's, and no longer end the work.
			signal.Notify(proxy, forwarded()...)
			a.signalsTaken.Store(true)
		}
		if err := writeCIDFile(o.cidfile, id); err != nil || s == nil {
			return err
		}
		return s.begin()
	}
	res, err := e.Run(ctx, req)
	for _, w := range res.Warnings {
		fmt.Fprintf(a.err, "WARNING: %s\n", w)
	}
	if err != nil {
		if o.detach && res.ID != "" && !o.req.HostConfig.AutoRemove {
			fmt.Fprintln(a.out, res.ID) // it stays, created, for `logs` and `rm`; Docker names it as well
		}
		return runError(err)
	}
	if o.detach {
		fmt.Fprintln(a.out, res.ID)
		return nil
	}
	if res.Detached {
		return nil
	}
	return exit(res.ExitCode)
}

// writeCIDFile writes the id, without a newline, as Docker does.
func writeCIDFile(path, id string) error {
	if path == "" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return fmt.Errorf("create the container ID file: %w", err)
	}
	_, err = f.WriteString(id)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// runError gives an error of run itself the exit code 125, unless the engine knows a better one.
func runError(err error) error {
	var ge *engine.ExitError
	var ee *exitError
	if err == nil || errors.As(err, &ge) || errors.As(err, &ee) || errors.Is(err, context.Canceled) {
		return err
	}
	return &exitError{code: 125, err: err}
}
