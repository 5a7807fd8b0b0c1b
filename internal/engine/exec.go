package engine

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"strings"

	"conex/internal/container"
	"conex/internal/control"
)

// ExecRequest runs a further command in a running container.
type ExecRequest struct {
	Container        string
	Cmd, Env         []string
	User, WorkingDir string
	// Tty gives it a terminal, Interactive an input.
	Tty, Interactive bool
	// Detach returns as soon as it runs.
	Detach     bool
	Privileged bool
	Streams    Streams
}

// Exec runs a command in a running container and returns its exit code; 0 with Detach, and when the user detaches. A command that
// can't be executed is an *ExitError with 126 or 127.
func (e *Engine) Exec(ctx context.Context, req ExecRequest) (exitCode int, err error) {
	if req.WorkingDir != "" && !filepath.IsAbs(req.WorkingDir) {
		return 0, &ExitError{126, errors.New("OCI runtime exec failed: exec failed: Cwd must be an absolute path")}
	}
	n, err := e.snapshot(ctx, req.Container)
	if err != nil {
		return 0, err
	}
	rec := n.Record
	switch a := n.Alive(); {
	case a == nil:
		return 0, conflict("container %s is not running", rec.ID)
	case a.Status == container.Restarting:
		return 0, conflict("container %s is restarting, wait until the container is running", rec.ID)
	}
	q := control.ExecRequest{
		Cmd: req.Cmd, Env: req.Env, User: req.User, WorkingDir: req.WorkingDir, Tty: req.Tty, Detach: req.Detach,
		Stdin: req.Interactive && req.Streams.Stdin != nil, Privileged: req.Privileged,
	}
	if req.Tty && req.Streams.Resize != nil {
		select {
		case sz := <-req.Streams.Resize:
			q.Rows, q.Cols = sz.Rows, sz.Cols
		default:
		}
	}
	s, err := e.client(rec.ID).Exec(ctx, q)
	var ce *control.Error
	switch {
	case errors.Is(err, control.ErrGone):
		return 0, errors.Join(e.settleGone(ctx, rec.ID), conflict("container %s is not running", rec.ID))
	case errors.As(err, &ce) && ce.ExitCode != 0:
		return ce.ExitCode, &ExitError{ce.ExitCode, ce}
	case errors.As(err, &ce) && ce.Status == http.StatusConflict:
		// The monitor knows who paused it: who commits is waited for. It is named here as it was typed.
		return 0, conflict("%s", strings.Replace(ce.Message, rec.ID, req.Container, 1))
	case err != nil:
		return 0, err
	case s == nil:
		return 0, nil
	}
	defer s.Close()
	exit, err := e.join(ctx, rec, s, q.Stdin, req.Tty, &req.Streams)
	return exit.code, err
}
