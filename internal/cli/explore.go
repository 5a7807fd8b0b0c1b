package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"conex/internal/linux/slack"

	"golang.org/x/sys/unix"
)

// explorerName is the program with the full-screen explorer. It is not in this one because the terminal library's initialisation would
// cost every command the better part of a millisecond.
const explorerName = "conex-explore"

// explore becomes the explorer, which lies beside this program.
func (a *app) explore(ctx context.Context, image, platform string) error {
	_, in := terminal(a.in)
	_, out := terminal(a.out)
	if !in || !out {
		return fmt.Errorf("image explore needs a terminal: use `%s image explore --format json` or `%s image layers` here", a.name, a.name)
	}
	e, err := a.engine()
	if err != nil {
		return err
	}
	id, err := e.ImageID(ctx, image, platform)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	path := filepath.Join(filepath.Dir(self), explorerName)
	err = slack.Run(func() error {
		return unix.Exec(path, []string{explorerName, a.name, e.Root().Path(), e.State(), id}, os.Environ())
	})
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("image explore needs the program %s, which is not there: `make install` puts it beside %s; --format json and `%s image layers` do without",
			path, filepath.Base(self), a.name)
	}
	return fmt.Errorf("execute %s: %w", path, err)
}
