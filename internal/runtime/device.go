package runtime

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// DevicePermissions reports whether s is made of r, w and m, each at most once.
func DevicePermissions(s string) bool {
	return s != "" && len(s) <= 3 && strings.Trim(s, "rwm") == "" && strings.Count(s, "r") <= 1 && strings.Count(s, "w") <= 1 && strings.Count(s, "m") <= 1
}

// Devices describes the host's device at path, or all of a folder's, as they shall be called in a container.
func Devices(path, inContainer string) ([]specs.LinuxDevice, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(real)
	if err != nil {
		return nil, err
	}
	if !st.IsDir() {
		d, err := DeviceFromPath(real)
		d.Path = inContainer
		return []specs.LinuxDevice{d}, err
	}
	var out []specs.LinuxDevice
	err = filepath.WalkDir(real, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // gone meanwhile
			}
			return err
		}
		switch {
		case e.IsDir() && (e.Name() == "pts" || e.Name() == "shm" || e.Name() == "fd" || e.Name() == "mqueue"):
			return fs.SkipDir
		case e.Type()&os.ModeDevice == 0 || e.Name() == "console":
			return nil
		}
		d, err := DeviceFromPath(p)
		if err != nil {
			return nil //nolint:nilerr // gone meanwhile
		}
		rel, err := filepath.Rel(real, p)
		if err != nil {
			return err
		}
		d.Path = filepath.Join(inContainer, rel)
		out = append(out, d)
		return nil
	})
	if err == nil && len(out) == 0 {
		err = errNoDevice
	}
	return out, err
}

var errNoDevice = errors.New("not a device node")
