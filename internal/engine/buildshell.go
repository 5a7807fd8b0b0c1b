package engine

import (
	"context"
	"errors"
	"fmt"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/runtime"
)

// BuildShellRequest asks for a command in the place of a step of an earlier build.
type BuildShellRequest struct {
	build.ShellRequest
	// Name is the build's, as FindBuild takes it. At is the step's, as build.BuildRecord.Step takes it; "" is the step that failed, or the
	// last one of a build that did not.
	Name, At string
	// Note is told, before anything runs, which step it is and what of it is shown.
	Note func(r *build.BuildRecord, s *build.StepRecord, before bool)
}

// BuildShell runs a command with the file system, environment, mounts, user and working folder of a step of an earlier build, and returns
// its exit code. What it changes is thrown away. A command that can't be executed is an *ExitError with 126 or 127.
func (e *Engine) BuildShell(ctx context.Context, req BuildShellRequest) (code int, err error) {
	if req.Build, err = e.FindBuild(req.Name); err != nil {
		return 0, err
	}
	if req.Step, err = shellStep(req.Build, req.At); err != nil {
		return 0, err
	}
	ls, err := e.Layers()
	if err != nil {
		return 0, err
	}
	if err := e.root.Sweep(); err != nil {
		return 0, err
	}
	lease, err := collect.Hold(e.root)
	if err != nil {
		return 0, err
	}
	defer func() {
		if cerr := e.closeLease(ctx, lease); err == nil {
			err = cerr
		}
	}()
	if req.Note != nil {
		req.Note(req.Build, req.Step, req.Before || !req.Step.HasResult())
	}
	b := &build.Builder{
		Root: e.root, State: e.cfg.State, Layers: ls.Claiming(lease.Claim), Runtime: runtime.New(), Networks: e.Networks(),
		DNS: e.cfg.DNS, DNSSearch: e.cfg.DNSSearch, SystemdCgroup: e.systemdCgroup(),
	}
	code, err = b.Shell(ctx, req.ShellRequest)
	var ee *runtime.ExecError
	if errors.As(err, &ee) {
		return ee.ExitCode(), &ExitError{ee.ExitCode(), err}
	}
	return code, err
}

// shellStep is the step that a shell is wanted at.
func shellStep(r *build.BuildRecord, at string) (*build.StepRecord, error) {
	if at != "" {
		return r.Step(at)
	}
	var last *build.StepRecord
	for i := range r.Steps {
		s := &r.Steps[i]
		if s.Kind == "" {
			continue
		}
		if s.Outcome == build.OutcomeFailed {
			return s, nil
		}
		last = s
	}
	if last == nil {
		return nil, fmt.Errorf("build %s: %w: it has no step", r.ID, build.ErrNoBuild)
	}
	return last, nil
}
