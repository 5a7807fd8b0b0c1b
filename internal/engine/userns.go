package engine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"conex/internal/config"
	"conex/internal/container"

	apic "github.com/moby/moby/api/types/container"
)

// Values of --userns beside Docker's "host", which is what it is without the flag. Both give the container a user namespace with a
// range of the host's ids that no other container has and no user of the host: layers, volumes and tmpfs show with the container's ids,
// bind mounts as nobody's. nomap also refuses mounts that would make the container some user of the host (idmap).
const (
	usernsAuto  = "auto"
	usernsNomap = "nomap"
)

// defaultIDs is how many ids a container has: 0 to 65535, as images use them.
const defaultIDs = 1 << 16

// maxIDs bounds what one container may ask for.
const maxIDs = 1 << 24

// usersMode reads --userns: whether the container has a user namespace, and how many ids.
func usersMode(mode apic.UsernsMode) (name string, size uint32, err error) {
	name, opts, _ := strings.Cut(string(mode), ":")
	bad := func() (string, uint32, error) {
		return "", 0, invalid("invalid USER mode: %s: use %s[:size=NUMBER], %s or host", mode, usernsAuto, usernsNomap)
	}
	size = defaultIDs
	switch name {
	case "", "host":
		if opts != "" {
			return bad()
		}
		return "", 0, nil
	case usernsAuto, usernsNomap:
	default:
		return bad()
	}
	if opts == "" {
		return name, size, nil
	}
	v, ok := strings.CutPrefix(opts, "size=")
	n, perr := strconv.ParseUint(v, 10, 32)
	if !ok || perr != nil || n == 0 {
		return bad()
	}
	if n > maxIDs {
		return "", 0, invalid("--userns %s: a container may have %d ids", mode, maxIDs)
	}
	return name, uint32(n), nil
}

// validateUsers refuses what a user namespace excludes, in Docker's words.
func validateUsers(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	name, _, err := usersMode(hc.UsernsMode)
	switch {
	case err != nil || name == "":
		return err
	case hc.Privileged:
		return invalid("privileged mode is incompatible with user namespaces.  You must run the container in the host namespace when running privileged mode")
	case hc.NetworkMode.IsHost():
		return invalid("cannot share the host's network namespace when user namespaces are enabled")
	case hc.PidMode.IsHost():
		return invalid("cannot share the host PID namespace when user namespaces are enabled")
	case hc.PidMode.IsContainer():
		return invalid("cannot join the PID namespace of another container when user namespaces are enabled")
	}
	return nil
}

// findUsers finds a range of ids that no container has, and none that the host has given to users of its own.
func (e *Engine) findUsers(taken []container.IDs, size uint32) (*container.IDs, error) {
	pool, err := config.ParseIDRange(e.cfg.UsernsRange)
	if err != nil {
		return nil, err
	}
	for _, path := range []string{"/etc/subuid", "/etc/subgid"} {
		more, err := subordinate(path)
		if err != nil {
			return nil, err
		}
		taken = append(taken, more...)
	}
	ids, err := freeIDs(pool, taken, size)
	return &ids, err
}

// subordinate reads subuid(5): name:first:count lines. Lines that say nothing are none.
func subordinate(path string) ([]container.IDs, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []container.IDs
	s := bufio.NewScanner(f)
	for s.Scan() {
		parts := strings.Split(s.Text(), ":")
		if len(parts) != 3 {
			continue
		}
		first, err1 := strconv.ParseUint(parts[1], 10, 32)
		size, err2 := strconv.ParseUint(parts[2], 10, 32)
		if err1 == nil && err2 == nil {
			out = append(out, container.IDs{First: uint32(first), Size: uint32(size)})
		}
	}
	return out, s.Err()
}

// freeIDs returns the first range of the pool that overlaps none of those taken. Ranges begin at multiples of 65536, so that a container
// can be told by the upper half of an id.
func freeIDs(pool config.IDRange, taken []container.IDs, size uint32) (container.IDs, error) {
	const step = 1 << 16
	first := (uint64(pool.First) + step - 1) / step * step
	last := uint64(pool.First) + uint64(pool.Size)
	for first+uint64(size) <= last {
		end := first + uint64(size)
		next := uint64(0)
		for _, t := range taken {
			if tEnd := uint64(t.First) + uint64(t.Size); uint64(t.First) < end && first < tEnd {
				next = max(next, (tEnd+step-1)/step*step)
			}
		}
		if next == 0 {
			return container.IDs{First: uint32(first), Size: size}, nil
		}
		first = next
	}
	return container.IDs{}, fmt.Errorf("no %d ids are free in userns-range %s: remove containers, or widen it in the configuration", size, pool)
}
