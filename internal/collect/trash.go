package collect

import (
	"fmt"
	"os"
	"syscall"

	"conex/internal/disk"
	"conex/internal/initstage"
)

func init() { initstage.Takeover(sweeper, sweeperMain) }

// sweeper is the argv[0] of a process that empties a root's trash.
const sweeper = "conex-sweeper"

// plenty is how many bytes of trash are worth a process of their own. Where the file system discards what it frees (mount option
// discard, without a journal), unlinking 50 MB takes 12 ms; starting the process takes 2.
const plenty = 64 << 20

// emptyTrash clears trash/ and staging/: at once, or, when a sweep has put many bytes there, in a process that outlives this one. What
// that leaves undone when it is killed is done by the next pull, build or prune, as after any crash, and system df shows it meanwhile.
func emptyTrash(root *disk.Root, bytes int64) error {
	if bytes >= plenty && startSweeper(root) == nil {
		return nil
	}
	return root.Sweep()
}

func startSweeper(root *disk.Root) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{sweeper, root.Path()}, &os.ProcAttr{
		Dir: "/", Env: []string{"GOMAXPROCS=1"}, Files: []*os.File{null, null, null}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return err
	}
	go func() { // ends with the sweeper; reaps it should it end before us
		_, _ = p.Wait()
	}()
	return nil
}

// sweeperMain is the sweeper.
func sweeperMain() int {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: "+sweeper+" ROOT")
		return 2
	}
	root, err := disk.OpenRoot(os.Args[1])
	if err == nil {
		err = root.Sweep()
	}
	if err != nil {
		return 1 // nobody is there to be told; the next sweep tries again, and says why it can't
	}
	return 0
}
