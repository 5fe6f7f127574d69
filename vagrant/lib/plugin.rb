# SPDX-License-Identifier: Apache-2.0
module Cwndtrace
  # Restarts the VM unless it runs the kernel that provision/kernel.sh chose. It reloads the VM, because a reboot would
  # cut the connection through which a port is forwarded.
  class Boot < Vagrant.plugin("2", :provisioner)
    CHOSEN = 'test "$(uname -r)" = "$(cat /etc/cwndtrace/kernel)"'.freeze

    def provision
      if @machine.communicate.test(CHOSEN)
        @machine.ui.info("the VM runs the chosen kernel already")
      else
        @machine.ui.info("restarting the VM into the chosen kernel")
        @machine.action(:reload, provision_enabled: false)
      end
    end
  end

  # Adds a cure to the error of a box that can't be fetched.
  class BoxHint
    def initialize(app, _env)
      @app = app
    end

    def call(env)
      @app.call(env)
    rescue Vagrant::Errors::BoxAddShortNotFound, Vagrant::Errors::BoxAddNoMatchingVersion,
           Vagrant::Errors::BoxAddNoMatchingProvider, Vagrant::Errors::BoxMetadataDownloadError,
           Vagrant::Errors::DownloaderError => e
      box = env[:machine].config.vm.box
      raise Problem.new("the box #{box} can't be fetched: #{e.message.strip.lines.last.strip}",
                        "Build one from Debian's packages: sudo vagrant/box/build --output debian.box; VAGRANT_BOX=debian.box vagrant up")
    end
  end

  class Plugin < Vagrant.plugin("2")
    name "cwndtrace"
    provisioner(:cwndtrace_boot) { Boot }
    action_hook(:cwndtrace_box_hint, :machine_action_up) { |hook| hook.prepend(BoxHint) }
  end
end
