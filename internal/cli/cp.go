package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) cpCommand() *cobra.Command {
	var req engine.CopyRequest
	var quiet bool
	cmd := &cobra.Command{
		Use:   "cp [OPTIONS] CONTAINER:SRC_PATH DEST_PATH|-\n\t" + a.name + " cp [OPTIONS] SRC_PATH|- CONTAINER:DEST_PATH",
		Short: "Copy files/folders between a container and the local filesystem",
		Long: "Copy files/folders between a container and the local filesystem\n\n" +
			"Use '-' as the source to read a tar archive from stdin\nand extract it to a directory destination in a container.\n" +
			"Use '-' as the destination to stream a tar archive of a\ncontainer source to stdout.",
		Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case args[0] == "":
				return errors.New("source can not be empty")
			case args[1] == "":
				return errors.New("destination can not be empty")
			}
			if !cmd.Flags().Changed("quiet") {
				_, tty := terminal(a.out)
				quiet = !tty
			}
			from, src := splitCopyArg(args[0])
			to, dst := splitCopyArg(args[1])
			switch {
			case from != "" && to != "":
				return errors.New("copying between containers is not supported")
			case from == "" && to == "":
				return errors.New("must specify at least one container source")
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			ctx, stop := a.interruptible(cmd.Context())
			defer stop()
			if from != "" {
				req.Container, req.Path, req.Local = from, src, dst
				return a.copyFrom(ctx, e, req, quiet)
			}
			req.Container, req.Path, req.Local = to, dst, src
			return a.copyTo(ctx, e, req, quiet)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&req.Archive, "archive", "a", false, "Archive mode (copy all uid/gid information)")
	f.BoolVarP(&req.FollowLink, "follow-link", "L", false, "Always follow symbol link in SRC_PATH")
	f.BoolVarP(&quiet, "quiet", "q", false, "Suppress progress output during copy. Progress output is automatically suppressed if no terminal is attached")
	return cmd
}

// splitCopyArg cuts "CONTAINER:PATH"; a path of the machine has no container. One with a colon in it is written with "./" or "/" first.
func splitCopyArg(arg string) (container, path string) {
	if filepath.IsAbs(arg) {
		return "", arg
	}
	container, path, ok := strings.Cut(arg, ":")
	if !ok || strings.HasPrefix(container, ".") {
		return "", arg
	}
	return container, path
}

// absolute is filepath.Abs that keeps an end in "/" or "/.", which says what is to be copied.
func absolute(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	switch {
	case filepath.Base(path) == ".":
		return strings.TrimSuffix(abs, "/") + "/.", nil
	case strings.HasSuffix(path, "/") && abs != "/":
		return abs + "/", nil
	}
	return abs, nil
}

func (a *app) copyFrom(ctx context.Context, e *engine.Engine, req engine.CopyRequest, quiet bool) (err error) {
	if req.Local == "-" {
		req.Torn = func(path string) {
			fmt.Fprintf(a.err, "%s: %s was cut off while it was read: it ends with zeros in the archive\n", a.name, path)
		}
		return e.CopyOut(ctx, req, a.out)
	}
	if req.Local, err = absolute(req.Local); err != nil {
		return err
	}
	req.LeftOut = func(path string) {
		fmt.Fprintf(a.err, "%s: %s is a device and was left out (--archive copies it)\n", a.name, cleanLines(path))
	}
	return a.copying("Copying from container - ", req.Local, req, quiet, func(r engine.CopyRequest) (int64, error) { return e.CopyFrom(ctx, r) })
}

func (a *app) copyTo(ctx context.Context, e *engine.Engine, req engine.CopyRequest, quiet bool) (err error) {
	do := func(r engine.CopyRequest) (int64, error) { return e.CopyTo(ctx, r) }
	if req.Local == "-" {
		do = func(r engine.CopyRequest) (int64, error) { return e.CopyIn(ctx, r, readerContext{ctx, a.in}) }
	} else if req.Local, err = absolute(req.Local); err != nil {
		return err
	}
	return a.copying("Copying to container - ", req.Container+":"+req.Path, req, quiet, do)
}

// readerContext ends with its context, at the next read.
type readerContext struct {
	ctx context.Context //nolint:containedctx // one copy, which it spans
	r   io.Reader
}

func (r readerContext) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// copying shows on a terminal how much has been copied, and says it at the end.
func (a *app) copying(title, to string, req engine.CopyRequest, quiet bool, do func(engine.CopyRequest) (int64, error)) error {
	_, tty := terminal(a.err)
	if tty && !quiet {
		var last time.Time
		req.Progress = func(n int64) {
			if now := time.Now(); now.Sub(last) > 75*time.Millisecond {
				last = now
				fmt.Fprintf(a.err, "\r\x1b[K%s%s", title, units.HumanSizeWithPrecision(float64(n), 3))
			}
		}
	}
	n, err := do(req)
	if tty && !quiet {
		fmt.Fprint(a.err, "\r\x1b[K")
	}
	if err == nil && !quiet {
		fmt.Fprintf(a.err, "Successfully copied %s to %s\n", units.HumanSizeWithPrecision(float64(n), 3), to)
	}
	return err
}
