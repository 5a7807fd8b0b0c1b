package quota

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLimit(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if err := Check("/proc"); !errors.Is(err, ErrNotSupported) {
		t.Errorf("/proc: %v", err)
	}
	if err := Check(t.TempDir()); errors.Is(err, unix.ESRCH) {
		t.Errorf("a folder without quotas: %v, which speaks of a process", err)
	}
	// Those of the guest (test/guest), else one of ext4 on a loop device.
	dirs := filepath.SplitList(os.Getenv("CONEX_QUOTA_DIRS"))
	if len(dirs) == 0 {
		dirs = []string{loopExt4(t)}
	}
	for _, at := range dirs {
		t.Run(filepath.Base(at), func(t *testing.T) { testLimit(t, at) })
	}
}

// loopExt4 mounts a new ext4 with project quotas.
func loopExt4(t *testing.T) string {
	dir := t.TempDir()
	img, at := filepath.Join(dir, "img"), filepath.Join(dir, "at")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 64<<20); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota", img).CombinedOutput(); err != nil {
		t.Skipf("needs mkfs.ext4 with project quotas: %v %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop,prjquota", img, at).CombinedOutput(); err != nil {
		t.Skipf("needs a kernel with ext4's quotas and loop devices: %v %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	return at
}

func testLimit(t *testing.T, at string) {
	if err := Check(at); err != nil {
		t.Fatal(err)
	}
	bounded := filepath.Join(at, "bounded")
	if err := os.MkdirAll(bounded, 0o755); err != nil {
		t.Fatal(err)
	}
	beside := filepath.Join(at, "beside")
	t.Cleanup(func() {
		if err := errors.Join(os.RemoveAll(bounded), os.RemoveAll(beside)); err != nil {
			t.Error(err)
		}
	})
	if err := Limit(bounded, 4711, 1<<20); err != nil {
		t.Fatal(err)
	}
	big := make([]byte, 2<<20)
	if err := os.WriteFile(filepath.Join(bounded, "small"), big[:100<<10], 0o600); err != nil {
		t.Error(err)
	}
	// ext4 lets whoever has CAP_SYS_RESOURCE pass every quota; what is written through an overlay never has it. It says EDQUOT, xfs ENOSPC.
	err := withoutResource(t, func() error { return os.WriteFile(filepath.Join(bounded, "big"), big, 0o600) })
	if !errors.Is(err, unix.EDQUOT) && !errors.Is(err, unix.ENOSPC) {
		t.Errorf("2 MB in a folder of 1 MB: %v", err)
	}
	if err := os.WriteFile(beside, big, 0o600); err != nil {
		t.Errorf("beside the folder: %v", err)
	}
}

// withoutResource runs f without CAP_SYS_RESOURCE, on a thread that ends with it.
func withoutResource(t *testing.T, f func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var d [2]unix.CapUserData
		err := unix.Capget(&h, &d[0])
		if err == nil {
			d[0].Effective &^= 1 << unix.CAP_SYS_RESOURCE
			err = unix.Capset(&h, &d[0])
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}
