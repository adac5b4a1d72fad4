# For tools that expect node-gyp: the addon itself is built by scripts/build-native.mjs, from native/CMakeLists.txt where CMake is
# installed. package.json says "gypfile": false, so that npm does not run node-gyp on install.
{
  "targets": [
    {
      "target_name": "limbeck",
      "type": "none",
      "actions": [
        {
          "action_name": "build_native",
          "message": "building the native core",
          "inputs": ["native/build.json", "native/CMakeLists.txt", "<!@(node scripts/build-native.mjs --list)"],
          "outputs": ["<(PRODUCT_DIR)/limbeck.node"],
          "action": ["node", "scripts/build-native.mjs"]
        }
      ]
    }
  ]
}
