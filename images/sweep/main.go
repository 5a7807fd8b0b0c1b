// Command sweep takes down what a conex data folder still has in the kernel once its containers are gone: the default
// bridge, its nftables table, forwarding where conex switched it on, and the mounts of layers. The folders stay.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"conex/internal/disk"
	"conex/internal/network"
)

func main() {
	root := flag.String("root", os.Getenv("CONEX_ROOT"), "conex data folder")
	state := flag.String("state", os.Getenv("CONEX_STATE"), "conex state folder")
	flag.Parse()
	if err := sweep(*root, *state); err != nil {
		fmt.Fprintln(os.Stderr, "sweep:", err)
		os.Exit(1)
	}
}

func sweep(rootDir, state string) error {
	if rootDir == "" || state == "" {
		return errors.New("-root and -state are needed")
	}
	root, err := disk.OpenRoot(rootDir)
	if err != nil {
		return err
	}
	mounts, err := below(state)
	if err != nil {
		return err
	}
	errs := []error{network.Open(root, state).Cleanup(context.Background())}
	for i := len(mounts) - 1; i >= 0; i-- { // the last mount first
		if err := unix.Unmount(mounts[i], unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", mounts[i], err))
		}
	}
	return errors.Join(errs...)
}

// below lists the mount points under dir, in the order of their mounting.
func below(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	return found, lines.Err()
}
