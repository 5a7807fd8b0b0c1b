package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) imageMountCommand() *cobra.Command {
	var all bool
	var format string
	cmd := &cobra.Command{
		Use: "mount [OPTIONS] [IMAGE...]", Short: "Mount images' filesystems, read-only, or list those that are mounted", Args: a.atLeast(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			if format != "" && format != "json" {
				return fmt.Errorf("unknown format %q: there is json", format)
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			if all && len(args) > 0 {
				return errors.New("--all and names of images can't be given together")
			}
			if all {
				list, err := e.ListImages(cmd.Context(), engine.ImagesRequest{})
				if err != nil {
					return err
				}
				for _, img := range list {
					args = append(args, img.ID)
				}
			}
			if len(args) == 0 {
				return a.listImageMounts(cmd, e, format)
			}
			var errs []error
			for _, name := range args {
				path, err := e.MountImage(cmd.Context(), name)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(a.out, path)
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "Mount all images")
	cmd.Flags().StringVar(&format, "format", "", `Print the list as "json"`)
	return cmd
}

func (a *app) listImageMounts(cmd *cobra.Command, e *engine.Engine, format string) error {
	list, err := e.MountedImages(cmd.Context())
	if err != nil {
		return err
	}
	if format == "json" {
		enc := json.NewEncoder(a.out)
		enc.SetIndent("", " ")
		return enc.Encode(list)
	}
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	for _, m := range list {
		names := m.Repositories
		if len(names) == 0 {
			names = []string{string(m.ID)}
		}
		for _, n := range names {
			fmt.Fprintf(w, "%s\t%s\n", n, m.Path)
		}
	}
	return w.Flush()
}

func (a *app) imageUnmountCommand() *cobra.Command {
	var all, force bool
	cmd := &cobra.Command{
		Use: "unmount [OPTIONS] IMAGE [IMAGE...]", Short: "Unmount images' filesystems", Args: a.atLeast(0), Aliases: []string{"umount"},
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return errors.New("name images, or give --all")
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			var errs []error
			if all {
				ids, err := e.UnmountAllImages(cmd.Context(), force)
				if err != nil {
					return err
				}
				for _, id := range ids {
					fmt.Fprintln(a.out, id)
				}
			}
			for _, name := range args {
				id, err := e.UnmountImage(cmd.Context(), name, force)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(a.out, id)
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "Unmount all images that are mounted")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Unmount also what is in use")
	return cmd
}
