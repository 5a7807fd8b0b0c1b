package engine

import (
	"os"
	"syscall"

	"conex/internal/linux/cgroup"
	"conex/internal/linux/thread"
)

// monitorsCgroup is where monitors live, next to their containers' cgroups: one for all, since a monitor needs no limits and making
// it again costs a start nothing.
const monitorsCgroup = "conex/monitors"

// startSheltered starts a monitor outside of the cgroups of this process. In them it would be ended with the service that started
// its container, and keep a user's session open. It is born there: to move it later would wait for all processors, some
// milliseconds a hierarchy. Where cgroups can't be had, it lives in ours.
func startSheltered(path string, argv []string, attr *os.ProcAttr) (*os.Process, error) {
	cg, err := cgroup.New(monitorsCgroup)
	if err == nil {
		err = cg.Create(nil)
	}
	if err != nil {
		return os.StartProcess(path, argv, attr)
	}
	type result struct {
		p   *os.Process
		err error
	}
	done := make(chan result, 1)
	thread.Go(func() {
		p, err := startWithin(cg, path, argv, attr)
		done <- result{p, err}
	})
	r := <-done
	return r.p, r.err
}

func startWithin(cg cgroup.Manager, path string, argv []string, attr *os.ProcAttr) (*os.Process, error) {
	if err := cg.EnterThread(); err != nil { // a teardown has removed it
		return os.StartProcess(path, argv, attr)
	}
	a := *attr
	sys := syscall.SysProcAttr{}
	if a.Sys != nil {
		sys = *a.Sys
	}
	a.Sys = &sys
	dir, err := cg.FD()
	if err == nil && dir != nil {
		defer dir.Close()
		sys.UseCgroupFD, sys.CgroupFD = true, int(dir.Fd())
	}
	p, err := os.StartProcess(path, argv, &a)
	if err != nil && sys.UseCgroupFD { // another teardown has removed it, or the kernel has no clone3
		sys.UseCgroupFD = false
		p, err = os.StartProcess(path, argv, &a)
	}
	return p, err
}
